"""What Debian's Chromium has to say of a page: `python -m tests.browser page.html` fails where it is not content."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

# Appended to a copy of the page: counts its pictures when everything has been loaded, and says so in the document.
_PROBE = """
<script>
addEventListener("load", () => {
  const width = (element) => element.naturalWidth ?? element.getBoundingClientRect().width;
  const size = (element) => [width(element), element.outerHTML.slice(0, 80)];
  const asked = performance.getEntriesByType("resource").map((entry) => entry.name);
  const found = {pictures: [...document.querySelectorAll("img, svg")].map(size),
                 asked: asked.filter((name) => !name.startsWith("data:"))};
  document.body.insertAdjacentHTML("beforeend", `<pre id="probe">${encodeURIComponent(JSON.stringify(found))}</pre>`);
});
</script>
"""


def chromium() -> str | None:
    """The browser, where there is one."""
    return shutil.which("chromium")


def problems(page: Path) -> list[str]:
    """Errors on the console, pictures without width, addresses outside of the page; an empty page is one, too."""
    browser = chromium()
    assert browser is not None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "page.html")
        copy.write_text(page.read_text().replace("</body>", f"{_PROBE}</body>"))
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
        command += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", copy.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (probe,) = re.findall(r'<pre id="probe">([^$<]+)</pre>', shown.stdout)
    found = json.loads(unquote(probe))
    said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    said += [f"picture without width: {start}" for width, start in found["pictures"] if not width]
    said += [f"asked for {address}" for address in found["asked"]]
    return said if found["pictures"] else [*said, "no picture at all"]


if __name__ == "__main__":
    for line in (found := problems(Path(sys.argv[1]))):
        print(line)
    sys.exit(bool(found))
