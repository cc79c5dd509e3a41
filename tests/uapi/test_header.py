"""Headers that are read at run time: every number, size and offset as a C compiler has it, for every kernel that is here."""

import textwrap

import pytest

from vdpabridge.errors import VdpaBridgeError
from vdpabridge.uapi.difference import differences
from vdpabridge.uapi.header import read_header

from ..abi.test_headers import FOLDERS, compiled

HEADERS = ["vhost.h", "vhost_types.h", "vduse.h", "virtio_blk.h", "virtio_net.h", "virtio_fs.h"]


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_everything_is_as_the_compiler_has_it(folder, name, tmp_path):
    path = folder / "linux" / name
    header = read_header(str(path))
    assert header.unknown == {}
    assert header.structures
    body = [
        f'printf("{each} %llu\\n", (unsigned long long)({each}));' for each in (*header.requests, *header.constants)
    ]
    for structure, (_, members) in header.structures.items():
        kind = "union" if f"union {structure} {{" in path.read_text() else "struct"
        body.append(f'printf("{structure} %zu\\n", sizeof({kind} {structure}));')
        body += [
            f'printf("{structure}.{each.name} %zu\\n", offsetof({kind} {structure}, {each.name}));' for each in members
        ]
    theirs = dict(line.split() for line in compiled(folder, tmp_path, "\n".join(body), [name, "ioctl.h"]) if line)
    mask = (1 << 64) - 1
    ours = {each.name: each.number for each in header.requests.values()}
    ours |= {constant: value & mask for constant, value in header.constants.items()}
    for structure, (size_bytes, members) in header.structures.items():
        ours[structure] = size_bytes
        ours |= {f"{structure}.{each.name}": each.offset for each in members}
    assert {each: int(theirs[each]) for each in ours} == ours


def written(tmp_path, text, name="proposal.h"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return str(path)


PROPOSAL = """
    #ifndef PROPOSAL_H
    #define PROPOSAL_H
    #include <linux/types.h>
    #include <linux/ioctl.h>
    #define VHOST_VIRTIO 0xAF
    #define NAME_MAX (1 << 4)   /* a comment, // in it */
    #define VHOST_BACKEND_F_STATE 0x3d
    enum state_direction { STATE_SAVE, STATE_LOAD = 5, STATE_ABORT };
    struct state_in {
        __u64 offset;           // where
        union {
            __u32 direction;
            __u8 raw[4];
        };
        struct { __le16 low; __s16 high; } parts;
        char name[NAME_MAX];
    };
    struct odd { __u8 a; __u64 b; } __attribute__((packed));
    struct list { __u32 count; __DECLARE_FLEX_ARRAY(struct odd, entries); };
    #define STATE_TRANSFER _IOWR(VHOST_VIRTIO, \\
                                 0xE4, struct state_in)
    #define STATE_DONE _IO(VHOST_VIRTIO, 0xE5)
    #define STATE_SIZE _IOR(VHOST_VIRTIO, 0xE6, __u64)
    #endif
"""


def test_a_proposal(tmp_path):
    header = read_header(written(tmp_path, PROPOSAL))
    assert header.unknown == {}
    numbers = {name: each.number for name, each in header.requests.items()}
    assert numbers == {"STATE_TRANSFER": 0xC020AFE4, "STATE_DONE": 0xAFE5, "STATE_SIZE": 0x8008AFE6}
    assert header.constants == {
        "VHOST_VIRTIO": 0xAF,
        "NAME_MAX": 16,
        "VHOST_BACKEND_F_STATE": 0x3D,
        "STATE_SAVE": 0,
        "STATE_LOAD": 5,
        "STATE_ABORT": 6,
    }
    size_bytes, members = header.structures["state_in"]
    assert size_bytes == 32
    assert [(each.name, each.offset, each.size_bytes) for each in members] == [
        ("offset", 0, 8),
        ("direction", 8, 4),
        ("raw", 8, 4),
        ("parts", 12, 4),
        ("name", 16, 16),
    ]
    assert header.structures["odd"][0] == 9
    assert [(each.name, each.offset) for each in header.structures["list"][1]] == [("count", 0), ("entries", 4)]


NOT_EVALUATED = {
    "an unknown type": ("#define BAD _IOW(0xAF, 1, struct nowhere)", "BAD", "struct nowhere"),
    "a text": ('#define BAD "text"', "BAD", "not an integer"),
    "an unknown name": ("#define BAD (OTHER + 1)", "BAD", "OTHER is not known"),
    "itself": ("#define BAD (BAD + 1)", "BAD", "defined by itself"),
    "a shift that does not end": ("#define BAD (1 << 99999999999)", "BAD", "a shift by"),
    "a number that does not fit": ("#define BAD _IO(0xAF, 0x123)", "BAD", "do not fit"),
    "a request of too few parts": ("#define BAD _IOW(0xAF, 3)", "BAD", "not a request"),
    "a structure that is not C": ("struct bad { __u32 };;", "struct bad", ""),
    "an array of nothing known": ("struct bad { __u8 data[UNKNOWN]; };", "struct bad", "UNKNOWN is not known"),
    "a character of C's own": (r"#define BAD '\n'", "BAD", "not an"),
    "what depends on a width": ("#define BAD (~0U)", "BAD", "not an integer"),
    "a call": ("#define BAD exit(1)", "BAD", "not an integer"),
    "an attribute": ("#define BAD (1).__class__", "BAD", "not an"),
}


@pytest.mark.parametrize("case", NOT_EVALUATED)
def test_what_is_not_evaluated_is_listed_and_not_fatal(tmp_path, case):
    text, name, why = NOT_EVALUATED[case]
    header = read_header(written(tmp_path, f"#define GOOD 7\n{text}\n#define ALSO_GOOD (GOOD * 2)\n"))
    assert header.constants["ALSO_GOOD"] == 14
    assert why in header.unknown[name]


@pytest.mark.parametrize("depth", [3000, 100_000])
def test_a_header_that_goes_too_deep(tmp_path, depth):
    header = read_header(written(tmp_path, f"#define BAD {'(' * depth}1{')' * depth}\n#define GOOD 1\n"))
    assert set(header.unknown) == {"BAD"}
    assert header.constants == {"GOOD": 1}


def test_headers_that_include_each_other(tmp_path):
    (tmp_path / "linux").mkdir()
    written(tmp_path / "linux", "#include <linux/b.h>\n#define A (B + 1)\n", "a.h")
    written(tmp_path / "linux", "#include <linux/a.h>\n#define B 1\n", "b.h")
    assert read_header(str(tmp_path / "linux/a.h")).constants == {"A": 2, "B": 1}


def test_collisions(tmp_path):
    text = "#define ONE _IO(0xAF, 1)\n#define OTHER _IO(0xAF, 1)\n#define THIRD _IOR(0xAF, 1, int)\n"
    assert read_header(written(tmp_path, text)).collisions == [("ONE", "OTHER")]


def test_differences(tmp_path):
    before = read_header(written(tmp_path, PROPOSAL))
    after = read_header(
        written(tmp_path, PROPOSAL.replace("0xE5", "0xE7").replace("__u64 offset", "__u32 offset; __u32 length"), "b.h")
    )
    changes = {each.name: (each.kind, each.before, each.after) for each in differences(before, after)}
    assert changes["STATE_DONE"] == ("request", "0x0000afe5 without argument", "0x0000afe7 without argument")
    assert changes["state_in"][0] == "structure"
    assert set(changes) == {"STATE_DONE", "state_in"}
    assert differences(before, before) == []


def test_a_header_that_is_not_there(tmp_path):
    with pytest.raises(VdpaBridgeError, match="No such file"):
        read_header(str(tmp_path / "nowhere.h"))
