"""A file in two places: as a copy, a hard link, or shared blocks, whichever keeps its bytes and takes least."""

from pathlib import Path

import pytest

from aquilamoe.checkpoint.placing import place


@pytest.fixture
def original(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights" * 1000)
    return path


def test_a_file_that_is_written_again_in_place_leaves_what_was_placed_as_it_was(original: Path, tmp_path: Path) -> None:
    assert place(original, tmp_path / "placed") in ("copied", "shared")
    with original.open("r+b") as file:
        file.write(b"others!")
    assert (tmp_path / "placed").read_bytes() == b"weights" * 1000


def test_a_read_only_file_takes_no_more_space(original: Path, tmp_path: Path) -> None:
    original.chmod(0o444)
    how = place(original, tmp_path / "placed")
    assert how in ("linked", "shared")
    assert how == "shared" or (tmp_path / "placed").samefile(original)


def test_a_blob_of_a_hubs_cache_takes_no_more_space_and_is_no_link_into_the_cache(tmp_path: Path) -> None:
    blob, snapshot = tmp_path / "blobs" / "0123", tmp_path / "snapshots" / "main"
    blob.parent.mkdir()
    snapshot.mkdir(parents=True)
    blob.write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert place(snapshot / "model.safetensors", tmp_path / "placed") in ("linked", "shared")
    assert not (tmp_path / "placed").is_symlink()
    assert (tmp_path / "placed").read_bytes() == b"weights"


def test_a_file_without_a_second_name_on_another_disk_is_copied(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    original.chmod(0o444)
    monkeypatch.setattr("os.link", refuse)
    assert place(original, tmp_path / "placed") in ("copied", "shared")
    assert (tmp_path / "placed").read_bytes() == original.read_bytes()
