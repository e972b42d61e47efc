import pytest

from ktray.data.sources.parquets import ParquetRow
from ktray.data.sources.tars import TarMember
from ktray.data.sources.uris import ImageRef


@pytest.mark.parametrize(
    ("uri", "ref"),
    [
        ("/a/b c.jpg", ImageRef("/a/b c.jpg")),
        ("s3://bucket/key#1.jpg", ImageRef("s3://bucket/key#1.jpg")),
        ("/a/x.tar#member=d/1.jpg&offset=512&size=7", TarMember("/a/x.tar", member="d/1.jpg", offset=512, size=7)),
        ("/a/x.tar#member=a%26b%23%20%C3%BC.jpg&offset=0&size=0", TarMember("/a/x.tar", member="a&b# ü.jpg")),
        ("s3://b/x.parquet#row=12", ParquetRow("s3://b/x.parquet", row=12)),
        ("/x.parquet#row=0&column=my%20image", ParquetRow("/x.parquet", row=0, column="my image")),
        ("/a/x.tar#member=unfinished", ImageRef("/a/x.tar#member=unfinished")),
        ("/a/b.jpg#xywh=3,4,50,60", ImageRef("/a/b.jpg", box=(3, 4, 50, 60))),
        (
            "/x.tar#member=1.jpg&offset=512&size=7&xywh=0,0,1,1",
            TarMember("/x.tar", member="1.jpg", offset=512, size=7, box=(0, 0, 1, 1)),
        ),
        ("/x.parquet#row=3&xywh=1,2,3,4", ParquetRow("/x.parquet", row=3, box=(1, 2, 3, 4))),
        ("/a/b&xywh=3,4,50,60", ImageRef("/a/b&xywh=3,4,50,60")),
        ("/a/b.jpg#xywh=3,4,50", ImageRef("/a/b.jpg#xywh=3,4,50")),
    ],
)
def test_parse_and_format_are_inverse(uri, ref):
    assert ImageRef.parse(uri) == ref
    assert str(ref) == uri


def test_kinds():
    assert ImageRef.parse("/x.jpg").kind == "files"
    assert TarMember("/x.tar", member="", offset=0, size=1).kind == "tar"
    assert ImageRef.parse("/x.parquet#row=0").kind == "parquet"


def test_members_with_bytes_that_are_no_text_survive():
    ref = TarMember("/x.tar", member="caf\udce9.jpg", offset=512, size=3)
    assert ImageRef.parse(str(ref)) == ref
