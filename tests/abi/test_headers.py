"""Every number and every offset, against what a C compiler makes of kernel headers.

The machine's own, each VM kernel's that was built, and the newest that Debian has.
"""

import re
import subprocess
from pathlib import Path

import pytest
from vmimages.cache import cache_root
from vmimages.headers import newest_headers
from vmimages.host import HostError

from vdpabridge.abi import fuse, vdpa_netlink, vhost, virtio, virtio_blk, virtio_fs, virtio_net, virtio_ring
from vdpabridge.abi.layout import Layout

HEADERS = {
    vhost: ("vhost.h", "vhost_types.h"),
    virtio: ("virtio_ids.h", "virtio_config.h"),
    virtio_ring: ("virtio_ring.h",),
    virtio_blk: ("virtio_blk.h",),
    virtio_net: ("virtio_net.h",),
    virtio_fs: ("virtio_fs.h",),
    vdpa_netlink: ("vdpa.h",),
    fuse: ("fuse.h",),
}
PREFIXES = ("VHOST_", "VIRTIO_", "VRING_", "VDPA_", "FUSE_", "FOPEN_")
#: Numbers of VIRTIO 1.4 that no kernel header has yet, and structures' Python names that no macro has.
OURS_ALONE = {"VIRTIO_F_SUSPEND", "VIRTIO_CONFIG_S_SUSPEND"}
#: Macros that are no numbers, or only make sense to C.
NOT_NUMBERS = {
    "VHOST_FEATURES_OK",
    "VIRTIO_BLK_NO_LEGACY",
    "VIRTIO_NET_NO_LEGACY",
    "VIRTIO_CONFIG_NO_LEGACY",
    "VIRTIO_RING_NO_LEGACY",
}

#: A marker that says how far the number space goes: every release moves it.
MOVES = {"VIRTIO_TRANSPORT_F_END"}
#: The release that the tables are of.
TABLE_RELEASE = (7, 2)


def proposed():
    """What the proposal of device state names."""
    patches = Path(__file__).parents[2] / "vm-images/kernel/patches"
    text = "".join(patch.read_text() for patch in patches.glob("0*.patch"))
    return set(re.findall(r"^\+#define (VHOST_(?:VDPA_\w+|BACKEND_\w+))", text, re.MULTILINE))


def newest():
    try:
        return [newest_headers()]
    except HostError:  # no Debian, no network: the older headers are still compared
        return []


#: Not of the kernel that has somebody else's proposal: its numbers are read at run time.
OURS = [each for each in sorted(cache_root().glob("kernel/*/headers/include")) if "-other-" not in str(each)]
FOLDERS = [Path("/usr/include"), *OURS, *newest()]


def release(folder):
    text = (folder / "linux" / "version.h").read_text()
    return tuple(int(re.search(rf"LINUX_VERSION_{part} (\d+)", text)[1]) for part in ("MAJOR", "PATCHLEVEL"))


def numbers(module):
    """C name -> value, of everything that the module says is a number."""
    found = {
        name: value for name, value in vars(module).items() if name.startswith(PREFIXES) and isinstance(value, int)
    }
    for enum in (vars(module).get(name) for name in ("VhostIoctl", "VdpaCommand", "VdpaAttribute", "FuseOpcode")):
        found |= {member.name: int(member) for member in enum or ()}
    return {name: value for name, value in found.items() if name not in OURS_ALONE}


def layouts(module):
    return [value for value in vars(module).values() if isinstance(value, Layout)]


def compiled(folder, tmp_path, body, headers):
    source = tmp_path / "probe.c"
    includes = "".join(f"#include <linux/{header}>\n" for header in headers)
    source.write_text(f"#include <stdio.h>\n#include <stddef.h>\n{includes}int main(void) {{\n{body}\nreturn 0; }}\n")
    program = tmp_path / "probe"
    command = ["gcc", "-w", "-isystem", folder, "-o", program, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")


def macros(folder, header):
    source = (folder / "linux" / header).read_text()
    return {
        name for name in re.findall(r"^\s*#\s*define\s+(\w+)\s+\S", source, re.MULTILINE) if name.startswith(PREFIXES)
    }


def enumerators(folder, header):
    source = re.sub(r"/\*.*?\*/", "", (folder / "linux" / header).read_text(), flags=re.DOTALL)
    return {
        name
        for body in re.findall(r"enum\s+\w+\s*{(.*?)}", source, re.DOTALL)
        for name in re.findall(r"\b((?:VDPA|FUSE)_\w+)", body)
    }


def named(folder, module):
    """What the headers of ``module`` in ``folder`` name."""
    return (
        set().union(*(macros(folder, header) | enumerators(folder, header) for header in HEADERS[module])) - NOT_NUMBERS
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
@pytest.mark.parametrize("module", HEADERS, ids=lambda module: module.__name__)
def test_numbers(folder, module, tmp_path):
    ours = numbers(module)
    moving = set() if release(folder) == TABLE_RELEASE else MOVES
    known = sorted((set(ours) & named(folder, module)) - moving)
    assert known
    body = "\n".join(f'printf("{name} %llu\\n", (unsigned long long)({name}));' for name in known)
    theirs = dict(line.split() for line in compiled(folder, tmp_path, body, HEADERS[module]) if line)
    mask = (1 << 64) - 1
    assert {name: int(value) for name, value in theirs.items()} == {name: ours[name] & mask for name in known}


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if release(folder) <= TABLE_RELEASE], ids=str)
@pytest.mark.parametrize("module", [each for each in HEADERS if each is not fuse], ids=lambda module: module.__name__)
def test_nothing_that_a_header_names_is_missing(folder, module):
    # of FUSE there is what a virtio-fs device is tested with, and no more
    # the last had number 21 in 6.1, and later releases gave 21 to something else
    aliases = {"VDPA_ATTR_PAD", "VDPA_ATTR_MAX", "VDPA_GENL_NAME", "VDPA_ATTR_VDPA_DEV_SUPPORTED_FEATURES"}
    assert named(folder, module) - set(numbers(module)) - aliases == set()


@pytest.mark.parametrize("module", HEADERS, ids=lambda module: module.__name__)
def test_nothing_is_made_up(module):
    if max(map(release, FOLDERS)) < TABLE_RELEASE:
        pytest.skip("no kernel headers as new as the tables are to be had here")
    assert set(numbers(module)) - set().union(*(named(each, module) for each in FOLDERS)) - proposed() == set()


def test_all_of_the_proposal_is_known():
    assert proposed()
    assert proposed() - set(numbers(vhost)) == set()


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
@pytest.mark.parametrize(
    "module", [module for module in HEADERS if layouts(module)], ids=lambda module: module.__name__
)
def test_structures(folder, module, tmp_path):
    body = []
    text = "".join((folder / "linux" / header).read_text() for header in HEADERS[module])
    present = [layout for layout in layouts(module) if re.search(rf"struct {layout.c_name}\b\s*{{", text)]
    assert present
    for layout in present:
        body.append(f'printf("{layout.c_name} %zu\\n", sizeof(struct {layout.c_name}));')
        body += [
            f'printf("{layout.c_name}.{field} %zu\\n", offsetof(struct {layout.c_name}, {field}));'
            for field in layout.fields
            if re.search(rf"\b{field.split('.')[-1]}\b", text)
        ]
    theirs = dict(line.split() for line in compiled(folder, tmp_path, "\n".join(body), HEADERS[module]) if line)
    for layout in present:
        offsets = {field: offset for field, offset in layout.offsets.items() if f"{layout.c_name}.{field}" in theirs}
        assert {field: int(theirs[f"{layout.c_name}.{field}"]) for field in offsets} == offsets
        if len(offsets) == len(layout.fields):  # an older header's structure may be shorter
            assert layout.size_bytes == int(theirs[layout.c_name])


def test_the_message_that_is_written_has_the_size_of_its_structure():
    assert vhost.VHOST_MSG_V2_LAYOUT.size_bytes == 72
    assert vhost.VHOST_MSG_V2_LAYOUT.pack(2, 1, 0x1000, 0x2000, 0x3000, 3, 2) == bytes.fromhex(
        "02000000 01000000 0010000000000000 0020000000000000 0030000000000000 03 02" + "00" * 38
    )
