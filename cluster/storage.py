"""Where Ray Train and Ray Tune keep checkpoints: pyarrow's view of our files, local or remote."""

from __future__ import annotations

import contextlib
from typing import Any

from pyarrow import PythonFile
from pyarrow.fs import FileInfo, FileSelector, FSSpecHandler, PyFileSystem

from bld_core.storage import files
from bld_core.storage.patience import persist


def run_storage(folder: str) -> dict[str, Any]:
    """The arguments of a RunConfig whose runs live in a folder, a local path or a URL.

    Remote folders are not left to pyarrow's own S3 client: it gives up on a server after seconds, and marks folders by
    empty objects, which some servers (rclone) take for files.
    """
    if files.is_local(folder):
        return {"storage_path": folder}
    return {"storage_path": files.filesystem(folder)[1], "storage_filesystem": PyFileSystem(_Remote(folder))}


class _Remote(FSSpecHandler):
    """Remote files as pyarrow asks for them; folders are there when files are in them."""

    def __init__(self, url: str) -> None:
        super().__init__(files.filesystem(url)[0])
        self._url = url

    def __reduce__(self) -> tuple[type[_Remote], tuple[str]]:
        return _Remote, (self._url,)  # each process has a client of its own

    def _url_of(self, path: str) -> str:
        return str(self.fs.unstrip_protocol(path))

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return persist(f"look for {paths}", super().get_file_info, paths)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        return persist(f"list {selector.base_dir!r}", super().get_file_info_selector, selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def delete_dir(self, path: str) -> None:
        files.remove(self._url_of(path))

    def delete_file(self, path: str) -> None:
        files.remove(self._url_of(path))

    def open_input_stream(self, path: str) -> PythonFile:
        return PythonFile(files.open_read(self._url_of(path)), mode="r")

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> PythonFile:
        return PythonFile(_Upload(self._url_of(path)), mode="w")


class _Upload:
    """A file that is uploaded when it is closed; one that is dropped unclosed is not."""

    def __init__(self, url: str) -> None:
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(files.commit(url))
        self.closed = False

    def write(self, data: bytes) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._stack.close()
