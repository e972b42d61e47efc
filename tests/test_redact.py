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


@pytest.mark.parametrize(
    "name",
    [
        "hf_photos",
        "20261127-hf-photos-oriented-ab12",
        "/data/hf_my_photo_collection/store",
        "hf_image_classification_sets",
        "sk_learn_digits_images_of_2024",
        "sk-learn-digits-and-other-image-sets",
        "ghp_landscape_photographs_2020",
        "glpat_holiday",
        "AKIATA-district-aerial-images",
    ],
)
def test_names_of_files_stay_what_they_are(name):
    assert scrub(name) == name


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "aB3" * 12,
        "ghp_" + "aB3" * 12,
        "github_pat_" + "aB3_" * 20,
        "glpat-" + "aB3-" * 6,
        "sk-" + "aB3" * 16,
        "sk-proj-" + "aB_3-" * 10,
        "ASIA" + "A1" * 8,
    ],
)
def test_tokens_are_hidden_wherever_they_stand(token):
    assert scrub(f"x {token} y") == f"x {HIDDEN} y"
    assert scrub(f"https://h/{token}/z") == f"https://h/{HIDDEN}/z"
    assert credential_in(token) == "a key or token"
