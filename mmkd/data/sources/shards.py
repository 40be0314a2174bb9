"""Records of webdataset shards: tar files in which consecutive files with the same name, up to the
first dot, form a sample. They are not unpacked: headers are read once, then files at their offsets.

wids, the indexed reader of webdataset, is not in the package of webdataset 1.0.2. That of 0.2.111
accepts damaged headers, cannot read the long names of pax and GNU tars, returns wrong samples
after two files of one name, and builds its index again in every process. Here the index is an Arrow
table on disk, and errors name the tar file or the sample that cannot be read.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmkd.data.content import printable
from mmkd.data.images import SUFFIXES, Member
from mmkd.data.schema import ANSWERS
from mmkd.data.sources.arrow_index import keep, of_each_file, stamps
from mmkd.data.sources.json_records import parse_object
from mmkd.errors import DataError

PICTURES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)

UNREAD = frozenset(
    {"mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "wmv", "flv", "mp3", "wav", "flac",
     "ogg", "opus", "m4a", "aac", "avif", "heic", "heif", "jxl", "jp2", "svg", "eps", "pdf", "ppm",
     "pgm", "ico", "tga", "psd", "dds", "exr", "dcm"}
)  # fmt: skip
"""Media that mmkd does not read. A sample with one is refused, instead of training without it."""


class ShardRows:
    """Samples with an image such as KEY.jpg (or several such as KEY.0.jpg, ordered by number, or
    none), and a record in KEY.json or a caption in KEY.txt."""

    def __init__(self, files: list[Path], train: str, prompt: str):
        from datasets import Features, Value

        number, words = Value("int64"), Value("string")
        members = [{"extension": words, "offset": number, "size": number}]
        features = Features({"file": number, "record": number, "key": words, "members": members})
        self.files = files
        self.folder: Path | None = files[0].parent
        self.prompt = prompt
        self._table = keep(of_each_file, features, train, files=stamps(files), read=_samples)

    def __len__(self) -> int:
        return len(self._table)

    def place(self, index: int) -> str:
        found = self._table[index]
        return f"{self.files[found['file']]}: record {found['record']}"

    def row(self, index: int) -> dict[str, Any]:
        found = self._table[index]
        archive, key = str(self.files[found["file"]]), found["key"]
        members: dict[str, Member] = {}
        for m in found["members"]:
            name = f"{key}.{m['extension']}"
            if m["extension"] in members:
                raise DataError(
                    f"the sample has two files {printable(name)}", kind="two files of one name"
                )
            if m["extension"].rsplit(".", 1)[-1] in UNREAD:
                raise DataError(
                    f"the sample has the file {printable(name)}, which is not read",
                    hint=f"drop the sample; read are json, txt and {', '.join(PICTURES)}",
                    kind=f"a file .{m['extension'].rsplit('.', 1)[-1]}",
                )
            members[m["extension"]] = Member(archive, name, m["offset"], m["size"])
        shown = sorted((e for e in members if e.rsplit(".", 1)[-1] in PICTURES), key=_place_of)
        pictures = [members[extension] for extension in shown]
        row = self._said(members, len(pictures))
        if pictures:
            row = {**row, "image": None, "images": pictures}
        return row if row.get("id") is not None else {**row, "id": key}

    def _said(self, members: dict[str, Member], pictures: int) -> dict[str, Any]:
        """The record of a sample. A JSON file without a conversation is metadata of a caption."""
        row = parse_object(members["json"].read()) if "json" in members else {}
        if any(row.get(name) for name in ANSWERS) or "txt" not in members:
            return row
        try:
            caption = members["txt"].read().decode()
        except UnicodeDecodeError as error:
            raise DataError("the caption is not UTF-8", hint="repair or drop it") from error
        if not pictures:
            raise DataError("a caption without an image", hint="add the image or drop it")
        question = "<image>\n" * pictures + self.prompt
        return {
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": caption},
            ]
        }


def _samples(name: str) -> Iterator[dict[str, Any]]:
    record, key = 0, ""
    members: list[dict[str, Any]] = []
    for path, offset, size in _members(name):
        folder, slash, base = path.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            continue  # a hidden file, or one without an extension
        if folder + slash + stem != key and members:
            yield {"record": record, "key": key, "members": members}
            record, members = record + 1, []
        key = folder + slash + stem
        members.append({"extension": extension.lower(), "offset": offset, "size": size})
    if members:
        yield {"record": record, "key": key, "members": members}


def _place_of(extension: str) -> str:
    """Sort key of the images of a sample: KEY.10.jpg comes after KEY.9.jpg."""
    number = extension.partition(".")[0]
    return number.zfill(20) if number.isdecimal() else ""


def _members(archive: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file. Names are never used as paths.

    Raises:
        DataError: the archive is compressed or damaged, or has links or other special files.
    """
    last = ""
    try:
        with tarfile.open(archive, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else all headers stay there
                last = printable(member.name)
                if member.size < 0:  # the next header would be the same one
                    raise DataError(f"damaged at {last}", hint="copy or pack it again")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(f"{last} is not a regular file", hint="pack regular files only")
                yield member.name, member.offset_data, member.size
            # tarfile treats a broken header as the end.
            with open(archive, "rb") as file:
                file.seek(tar.offset)
                if any(file.read(tarfile.BLOCKSIZE)):
                    where = last or "its begin"
                    raise DataError(f"damaged after {where}", hint="copy or pack it again")
    except (tarfile.TarError, OSError, ValueError) as error:
        hint = (
            "copy or pack it again" if last else "name tars without compression, or copy it again"
        )
        behind = f" after {last}" if last else ""
        raise DataError(f"cannot read{behind}: {printable(error)}", hint=hint) from error
