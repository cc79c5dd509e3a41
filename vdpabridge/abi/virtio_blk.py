"""virtio-blk: features, request types, config space, request header.

Source: include/uapi/linux/virtio_blk.h of Linux 7.2; VIRTIO 1.4 section 5.2.
"""

from __future__ import annotations

from .layout import Layout

VIRTIO_BLK_F_SIZE_MAX = 1
VIRTIO_BLK_F_SEG_MAX = 2
VIRTIO_BLK_F_GEOMETRY = 4
VIRTIO_BLK_F_RO = 5
VIRTIO_BLK_F_BLK_SIZE = 6
VIRTIO_BLK_F_TOPOLOGY = 10
VIRTIO_BLK_F_MQ = 12
VIRTIO_BLK_F_DISCARD = 13
VIRTIO_BLK_F_WRITE_ZEROES = 14
VIRTIO_BLK_F_SECURE_ERASE = 16
VIRTIO_BLK_F_ZONED = 17
VIRTIO_BLK_F_BARRIER = 0
VIRTIO_BLK_F_SCSI = 7
VIRTIO_BLK_F_FLUSH = 9
VIRTIO_BLK_F_CONFIG_WCE = 11
VIRTIO_BLK_F_WCE = 9
VIRTIO_BLK_ID_BYTES = 20
VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_SCSI_CMD = 2
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13
VIRTIO_BLK_T_SECURE_ERASE = 14
VIRTIO_BLK_T_ZONE_APPEND = 15
VIRTIO_BLK_T_ZONE_REPORT = 16
VIRTIO_BLK_T_ZONE_OPEN = 18
VIRTIO_BLK_T_ZONE_CLOSE = 20
VIRTIO_BLK_T_ZONE_FINISH = 22
VIRTIO_BLK_T_ZONE_RESET = 24
VIRTIO_BLK_T_ZONE_RESET_ALL = 26
VIRTIO_BLK_T_BARRIER = 0x80000000
VIRTIO_BLK_Z_NONE = 0
VIRTIO_BLK_Z_HM = 1
VIRTIO_BLK_Z_HA = 2
VIRTIO_BLK_ZT_CONV = 1
VIRTIO_BLK_ZT_SWR = 2
VIRTIO_BLK_ZT_SWP = 3
VIRTIO_BLK_ZS_NOT_WP = 0
VIRTIO_BLK_ZS_EMPTY = 1
VIRTIO_BLK_ZS_IOPEN = 2
VIRTIO_BLK_ZS_EOPEN = 3
VIRTIO_BLK_ZS_CLOSED = 4
VIRTIO_BLK_ZS_RDONLY = 13
VIRTIO_BLK_ZS_FULL = 14
VIRTIO_BLK_ZS_OFFLINE = 15
VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1
VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2
VIRTIO_BLK_S_ZONE_INVALID_CMD = 3
VIRTIO_BLK_S_ZONE_UNALIGNED_WP = 4
VIRTIO_BLK_S_ZONE_OPEN_RESOURCE = 5
VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE = 6

#: Bytes in a sector, whatever ``blk_size`` says.
SECTOR_BYTES = 512

VIRTIO_BLK_OUTHDR = Layout("virtio_blk_outhdr", "<", (("type", "I"), ("ioprio", "I"), ("sector", "Q")))
VIRTIO_BLK_DISCARD_WRITE_ZEROES = Layout(
    "virtio_blk_discard_write_zeroes", "<", (("sector", "Q"), ("num_sectors", "I"), ("flags", "I"))
)
VIRTIO_BLK_CONFIG = Layout(
    "virtio_blk_config",
    "<",
    (
        ("capacity", "Q"),
        ("size_max", "I"),
        ("seg_max", "I"),
        ("geometry.cylinders", "H"),
        ("geometry.heads", "B"),
        ("geometry.sectors", "B"),
        ("blk_size", "I"),
        ("physical_block_exp", "B"),
        ("alignment_offset", "B"),
        ("min_io_size", "H"),
        ("opt_io_size", "I"),
        ("wce", "B"),
        ("unused", "B"),
        ("num_queues", "H"),
        ("max_discard_sectors", "I"),
        ("max_discard_seg", "I"),
        ("discard_sector_alignment", "I"),
        ("max_write_zeroes_sectors", "I"),
        ("max_write_zeroes_seg", "I"),
        ("write_zeroes_may_unmap", "B"),
        ("unused1", "3s"),
        ("max_secure_erase_sectors", "I"),
        ("max_secure_erase_seg", "I"),
        ("secure_erase_sector_alignment", "I"),
        ("zoned.zone_sectors", "I"),
        ("zoned.max_open_zones", "I"),
        ("zoned.max_active_zones", "I"),
        ("zoned.max_append_sectors", "I"),
        ("zoned.write_granularity", "I"),
        ("zoned.model", "B"),
        ("zoned.unused2", "3s"),
    ),
)

__all__ = [name for name in globals() if name.startswith(("VIRTIO_", "SECTOR_"))]
