"""Classes as people write them: numbers in any spelling, names of a list; what is a note or a caption is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bld_core.data.images import ImageConfig
from bld_core.data.labels import Labels, class_names
from bld_core.data.shards import parse_shard
from bld_core.data.skipped import Left, Reason
from tests.bld_core.data.test_shards import File, pair, tar_of


@pytest.fixture
def named(tmp_path: Path) -> Labels:
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "dog", "7"]))
    return Labels(names=f"{tmp_path}/classes.json")


NUMBERS = [b"7", b" 7\n", b"007", b"+7", b"7.0", b"7e0", b"[7]", b"[[7]]", b'"7"', b'["7.0"]']


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_read_in_every_spelling_and_place(text: bytes) -> None:
    assert [Labels().read({extension: text}) for extension in ("cls", "index", "txt")] == [7, 7, 7]
    if text.decode().strip()[0] not in "0+":  # which JSON does not know
        for name in ("label", "cls", "class"):
            assert Labels().read({"json": b'{"%s": %s, "width": 3}' % (name.encode(), text)}) == 7


def test_a_field_of_another_name_is_read_where_it_is_named() -> None:
    notes = {"json": b'{"label": 3, "species": "4"}'}
    assert Labels().read(notes) == 3
    assert Labels("species").read(notes) == 4
    assert Labels("genus").read(notes) == -1
    assert Labels().read({"json": b'{"class": null, "label": null}'}) == -1


def test_names_are_read_by_the_list_and_are_no_classes_without_it(named: Labels) -> None:
    for fields in (
        {"cls": b"dog\n"},
        {"txt": b'"dog"'},
        {"json": b'{"label": "dog"}'},
        {"json": b'{"class": ["dog"]}'},
    ):
        assert named.read(fields) == 1  # pyright: ignore[reportArgumentType]
    assert named.read({"cls": b"7"}) == 7
    assert Labels().read({"json": b'{"label": "dog"}'}) == -1
    for labels, text in ((Labels(), b"dog"), (named, b"bird")):
        with pytest.raises(ValueError, match=rf"'{text.decode()}' is no class"):
            labels.read({"cls": text})
    with pytest.raises(ValueError, match="'bird' is no class"):
        named.read({"json": b'{"label": "bird"}'})


@pytest.mark.parametrize("text", [b"1.5", b"-2", b"NaN", b"Infinity", b"true", b"[1, 2]", b"{}", str(2**31).encode()])
def test_other_values_are_named(text: bytes) -> None:
    shard = parse_shard(tar_of([*pair("a"), File("b.png"), File("b.cls", text)]), ["png"])
    [left] = shard.left
    assert left[:2] == (Reason.BAD_LABEL, "b")
    assert "is no class" in left.name
    assert text.decode().lower()[:3] in left.name.lower()


def test_captions_are_no_classes_also_where_one_of_them_is_a_number() -> None:
    captioned = [File("a.png"), File("a.txt", b"a street at night"), File("b.png"), File("b.txt", b"1984")]
    assert [sample.label for sample in parse_shard(tar_of(captioned), ["png"]).samples] == [-1, -1]
    classed = [File("a.png"), File("a.txt", b"3"), File("b.png"), File("b.txt", b"4")]
    assert [sample.label for sample in parse_shard(tar_of(classed), ["png"]).samples] == [3, 4]


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf7\n", "7\n".encode("utf-16"), b"7\0"], ids=["UTF-8", "UTF-16", "NUL"])
def test_what_editors_and_shells_of_other_systems_write_is_read(text: bytes) -> None:
    assert Labels().read({"cls": text}) == 7


def test_text_that_is_nested_without_end_is_a_caption_or_no_class() -> None:
    deep = b"[" * 100_000
    shard = parse_shard(tar_of([File("a.png"), File("a.txt", deep), File("b.png"), File("b.cls", deep)]), ["png"])
    assert [sample.key for sample in shard.samples] == ["a"]
    assert [(left.key, left.reason) for left in shard.left] == [("b", Reason.BAD_LABEL)]


def test_the_list_lies_beside_the_first_shard_or_where_it_is_said_to(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('["a", "b"]')
    shards = f"{tmp_path}/train-{{0000..0003}}.tar"
    assert list(ImageConfig(train=shards).names) == ["a", "b"]
    assert list(ImageConfig(train=f"{tmp_path}/x/*.tar").names) == []
    assert ImageConfig(train=f"{tmp_path}/*/y.tar").labels.names == ""
    signed = ImageConfig(train="https://host/data/a.tar?X-Amz-Signature=abc/def")
    assert signed.labels.names == "https://host/data/classes.json"
    with pytest.raises(ValueError, match=r"`class_names` is .*missing.json', which is not there"):
        _ = ImageConfig(train=shards, class_names=f"{tmp_path}/missing.json").names
    for text in ('{"a": 0}', '["a", "a"]', "[1]", "["):
        (tmp_path / "bad.json").write_text(text)
        class_names.cache_clear()
        with pytest.raises(ValueError, match=r"the class list .*bad.json' is no"):
            class_names(f"{tmp_path}/bad.json", given=True)


def test_dots_in_names_are_extensions_that_can_be_asked_for() -> None:
    members = [File("0.rgb.jpg", b"1"), File("0.depth.png", b"2"), File("0.cls", b"3")]
    [sample] = parse_shard(tar_of(members), ["rgb.jpg"]).samples
    assert (sample.key, sample.extension, sample.data, sample.label) == ("0", "rgb.jpg", b"1", 3)
    assert ImageConfig(extensions=["rgb.jpg"]).extensions == ["rgb.jpg"]
    with pytest.raises(ValueError, match=r"`extensions` names \['rgb.bmp'\]"):
        ImageConfig(extensions=["rgb.bmp", "png"])


def test_what_macos_adds_tears_no_sample_apart() -> None:
    members = [File(name, b"x") for name in ("set/._0.png", "__MACOSX/set/._0.png", "__MACOSX/set/0.png", "._set")]
    members += [File("set/0.png"), File("set/._0.cls", b"x"), File("set/0.cls", b"1"), File("other/0.png")]
    members += [File("other/0.cls", b"2")]
    shard = parse_shard(tar_of(members), ["png"])
    assert [(sample.key, sample.label) for sample in shard.samples] == [("set/0", 1), ("other/0", 2)]
    assert shard.left == list[Left]()
