"""An example with the peer that it is for."""

from ..support.examples import output_of


def test_save_virtiofsd(lab, tmp_path):
    shared = lab.shared()
    (shared / "notes").write_text("what is in the file")
    lab.virtiofsd(shared, "fs.sock", "--migration-mode", "find-paths")
    said = output_of("save_virtiofsd.py", f"vhost-user:{lab.path('fs.sock')},id=fs", "notes", tmp_path / "image")
    assert said.splitlines()[-1] == "read on: the same"
    told = output_of("inspect_image.py", tmp_path / "image", "sim:fs").splitlines()
    assert told[3].endswith("virtiofsd, version 2") or told[3].endswith("virtiofsd, version 1")
