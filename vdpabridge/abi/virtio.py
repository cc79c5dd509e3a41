"""Virtio constants common to all devices: device ids, status bits, feature bits.

Source: include/uapi/linux/virtio_ids.h and virtio_config.h of Linux 7.2; VIRTIO 1.4 section 2.1 and 6.
"""

VIRTIO_ID_NET = 1
VIRTIO_ID_BLOCK = 2
VIRTIO_ID_CONSOLE = 3
VIRTIO_ID_RNG = 4
VIRTIO_ID_BALLOON = 5
VIRTIO_ID_IOMEM = 6
VIRTIO_ID_RPMSG = 7
VIRTIO_ID_SCSI = 8
VIRTIO_ID_9P = 9
VIRTIO_ID_MAC80211_WLAN = 10
VIRTIO_ID_RPROC_SERIAL = 11
VIRTIO_ID_CAIF = 12
VIRTIO_ID_MEMORY_BALLOON = 13
VIRTIO_ID_GPU = 16
VIRTIO_ID_CLOCK = 17
VIRTIO_ID_INPUT = 18
VIRTIO_ID_VSOCK = 19
VIRTIO_ID_CRYPTO = 20
VIRTIO_ID_SIGNAL_DIST = 21
VIRTIO_ID_PSTORE = 22
VIRTIO_ID_IOMMU = 23
VIRTIO_ID_MEM = 24
VIRTIO_ID_SOUND = 25
VIRTIO_ID_FS = 26
VIRTIO_ID_PMEM = 27
VIRTIO_ID_RPMB = 28
VIRTIO_ID_MAC80211_HWSIM = 29
VIRTIO_ID_VIDEO_ENCODER = 30
VIRTIO_ID_VIDEO_DECODER = 31
VIRTIO_ID_SCMI = 32
VIRTIO_ID_NITRO_SEC_MOD = 33
VIRTIO_ID_I2C_ADAPTER = 34
VIRTIO_ID_WATCHDOG = 35
VIRTIO_ID_CAN = 36
VIRTIO_ID_DMABUF = 37
VIRTIO_ID_PARAM_SERV = 38
VIRTIO_ID_AUDIO_POLICY = 39
VIRTIO_ID_BT = 40
VIRTIO_ID_GPIO = 41
VIRTIO_ID_SPI = 45
VIRTIO_TRANS_ID_NET = 4096
VIRTIO_TRANS_ID_BLOCK = 4097
VIRTIO_TRANS_ID_BALLOON = 4098
VIRTIO_TRANS_ID_CONSOLE = 4099
VIRTIO_TRANS_ID_SCSI = 4100
VIRTIO_TRANS_ID_RNG = 4101
VIRTIO_TRANS_ID_9P = 4105

VIRTIO_CONFIG_S_ACKNOWLEDGE = 1
VIRTIO_CONFIG_S_DRIVER = 2
VIRTIO_CONFIG_S_DRIVER_OK = 4
VIRTIO_CONFIG_S_FEATURES_OK = 8
VIRTIO_CONFIG_S_NEEDS_RESET = 64
VIRTIO_CONFIG_S_FAILED = 128
VIRTIO_TRANSPORT_F_START = 28
VIRTIO_TRANSPORT_F_END = 42
VIRTIO_F_NOTIFY_ON_EMPTY = 24
VIRTIO_F_ANY_LAYOUT = 27
VIRTIO_F_VERSION_1 = 32
VIRTIO_F_ACCESS_PLATFORM = 33
VIRTIO_F_IOMMU_PLATFORM = 33
VIRTIO_F_RING_PACKED = 34
VIRTIO_F_IN_ORDER = 35
VIRTIO_F_ORDER_PLATFORM = 36
VIRTIO_F_SR_IOV = 37
VIRTIO_F_NOTIFICATION_DATA = 38
VIRTIO_F_NOTIF_CONFIG_DATA = 39
VIRTIO_F_RING_RESET = 40
VIRTIO_F_ADMIN_VQ = 41
#: VIRTIO 1.4's suspend bits; no 7.2 kernel header has them.
VIRTIO_F_SUSPEND = 43
VIRTIO_CONFIG_S_SUSPEND = 0x10

#: Virtio device id -> name, as iproute2's ``vdpa`` and QEMU spell it, if they know the device.
DEVICE_NAMES = {
    value: name.removeprefix("VIRTIO_ID_").lower().replace("_", "-")
    for name, value in list(globals().items())
    if name.startswith("VIRTIO_ID_")
} | {VIRTIO_ID_NET: "network", VIRTIO_ID_9P: "9p"}

#: What ``vdpa mgmtdev show`` calls a device class: "net", although a device's type is "network".
CLASS_NAMES = DEVICE_NAMES | {VIRTIO_ID_NET: "net"}

#: Bit of the status byte -> name.
STATUS_NAMES = {
    VIRTIO_CONFIG_S_ACKNOWLEDGE: "ACKNOWLEDGE",
    VIRTIO_CONFIG_S_DRIVER: "DRIVER",
    VIRTIO_CONFIG_S_DRIVER_OK: "DRIVER_OK",
    VIRTIO_CONFIG_S_FEATURES_OK: "FEATURES_OK",
    VIRTIO_CONFIG_S_SUSPEND: "SUSPEND",
    VIRTIO_CONFIG_S_NEEDS_RESET: "NEEDS_RESET",
    VIRTIO_CONFIG_S_FAILED: "FAILED",
}

__all__ = [name for name in globals() if name.startswith("VIRTIO_") or name.endswith("_NAMES")]


def device_name(device_id: int) -> str:
    """The name of a virtio device id; ``id-N`` for an id without a name."""
    return DEVICE_NAMES.get(device_id, f"id-{device_id}")


def status_names(status: int) -> str:
    """The set bits of a status byte, joined by ``|``; ``reset`` for 0."""
    return "|".join(name for bit, name in STATUS_NAMES.items() if status & bit) or "reset"


__all__ += ["device_name", "status_names"]
