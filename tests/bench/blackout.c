/* What moving a disk from one vhost-vdpa node to another takes at the least: "NODE NODE" makes the requests that
 * vdpabridge makes, and prints how many nanoseconds lie between suspending the first and the second's being started.
 * "ioctl NODE N" asks for the status N times. */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/vhost.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { MEMORY = 1 << 20, SIZE = 256, IOVA = 0x10000000, CONFIG = 96 };
enum { DESC = 0, AVAIL = 4096, USED = 8192, READY = 3, NEGOTIATED = 11, LIVE = 15 };

static void ask(int fd, unsigned long request, void *argument, const char *name)
{
	if (ioctl(fd, request, argument) < 0)
		err(1, "%s", name);
}
#define ASK(fd, request, argument) ask(fd, request, argument, #request)

static void map(int fd, void *memory)
{
	struct vhost_msg_v2 message = {.type = VHOST_IOTLB_MSG_V2};
	uint64_t features;

	ASK(fd, VHOST_SET_OWNER, NULL);
	ASK(fd, VHOST_GET_BACKEND_FEATURES, &features);
	ASK(fd, VHOST_SET_BACKEND_FEATURES, &features);
	message.iotlb.iova = IOVA;
	message.iotlb.size = MEMORY;
	message.iotlb.uaddr = (uintptr_t)memory;
	message.iotlb.perm = VHOST_ACCESS_RW;
	message.iotlb.type = VHOST_IOTLB_UPDATE;
	if (write(fd, &message, sizeof message) < 0)
		err(1, "map");
}

static void set_status(int fd, uint8_t status)
{
	uint8_t now;

	ASK(fd, VHOST_VDPA_SET_STATUS, &status);
	ASK(fd, VHOST_VDPA_GET_STATUS, &now);
	if (now != status)
		errx(1, "status is %u, not %u", now, status);
}

static void negotiate(int fd)
{
	uint64_t offered, accepted;

	ASK(fd, VHOST_GET_FEATURES, &offered);
	set_status(fd, 1);
	set_status(fd, READY);
	accepted = 1ull << 32 | (offered & 1ull << 33);
	ASK(fd, VHOST_SET_FEATURES, &accepted);
	set_status(fd, NEGOTIATED);
}

static void set_up(int fd, int call)
{
	struct vhost_vring_state number = {0, SIZE};
	struct vhost_vring_addr at = {
		.desc_user_addr = IOVA + DESC, .avail_user_addr = IOVA + AVAIL, .used_user_addr = IOVA + USED};
	struct vhost_vring_file file = {0, call}, none = {0, -1};

	ASK(fd, VHOST_SET_VRING_NUM, &number);
	ASK(fd, VHOST_SET_VRING_ADDR, &at);
	ASK(fd, VHOST_SET_VRING_CALL, &file);
	ASK(fd, VHOST_SET_VRING_ERR, &none);
}

static void start(int fd, unsigned base, int kick)
{
	struct vhost_vring_state position = {0, base}, enable = {0, 1};
	struct vhost_vring_file file = {0, kick};

	ASK(fd, VHOST_SET_VRING_BASE, &position);
	ASK(fd, VHOST_SET_VRING_KICK, &file);
	ASK(fd, VHOST_VDPA_SET_VRING_ENABLE, &enable);
	set_status(fd, LIVE);
	eventfd_write(kick, 1);
}

static long long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static int ask_status(const char *node, long times)
{
	int fd = open(node, O_RDWR);
	uint8_t status;
	long long begin = now_ns();

	for (long i = 0; i < times; i++)
		ASK(fd, VHOST_VDPA_GET_STATUS, &status);
	printf("%lld\n", now_ns() - begin);
	return 0;
}

int main(int argc, char **argv)
{
	union {
		struct vhost_vdpa_config head;
		char bytes[sizeof(struct vhost_vdpa_config) + CONFIG];
	} config = {0};
	struct vhost_vring_state position = {0, 0};
	int kick = eventfd(0, EFD_NONBLOCK), call = eventfd(0, EFD_NONBLOCK), memory = memfd_create("guest", 0);
	int source, destination;
	uint32_t config_size;
	long long begin;
	uint8_t status;
	void *at;

	if (argc == 4 && !strcmp(argv[1], "ioctl"))
		return ask_status(argv[2], atol(argv[3]));
	if (argc != 3 || ftruncate(memory, MEMORY))
		return 2;
	at = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
	source = open(argv[1], O_RDWR);
	destination = open(argv[2], O_RDWR);
	if (source < 0 || destination < 0)
		err(1, "open");
	map(source, at);
	map(destination, at);
	ASK(source, VHOST_VDPA_GET_CONFIG_SIZE, &config_size);
	config.head.len = config_size < CONFIG ? config_size : CONFIG;
	negotiate(source);
	set_up(source, call);
	start(source, 0, kick);
	negotiate(destination);
	set_up(destination, call);

	begin = now_ns();
	ASK(source, VHOST_VDPA_GET_STATUS, &status);
	ASK(source, VHOST_VDPA_SUSPEND, NULL);
	ASK(source, VHOST_GET_VRING_BASE, &position);
	ASK(source, VHOST_VDPA_GET_CONFIG, &config);
	start(destination, position.num, kick);
	printf("%lld\n", now_ns() - begin);
	return 0;
}
