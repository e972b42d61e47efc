"""What is taken for a secret."""

import pytest

from ktray.redact import HIDDEN, credential_in, scrub


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("http://user:pass@host:5000", "a password"),
        ("postgresql+psycopg2://u:p%40ss@h/db", "a password"),
        ("s3://key:secret@bucket/prefix", "a password"),
        (["a", "https://h/x.tar?X-Amz-Signature=abcdef&y=1"], "a signed URL"),
        ({"kwargs": {"x": "hf_" + "a" * 34}}, "a key or token"),
        ("AKIA" + "A" * 16, "a key or token"),
    ],
)
def test_credentials_are_known_by_their_form(text, what):
    assert credential_in(text) == what


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://ktray@host/runs",
        "sqlite:////home/me@work/a:b@c/mlflow.db",
        "s3://bucket/a:b@c.jpg",
        "http://127.0.0.1:5000",
        "a photo of a standard bearer carrying {}",
        "hf_datasets_collection_of_2024_images",
        "open_clip:ViT-L-14/datacomp_xl_s13b_b90k",
        {"class_token": True, "global_pool": "token"},
        3,
    ],
)
def test_what_looks_a_little_like_one_may_stay(text):
    assert credential_in(text) == ""


def test_a_password_with_an_at_sign_is_hidden_whole():
    assert scrub("failed: http://user:p@ss@host/x") == f"failed: http://{HIDDEN}@host/x"
