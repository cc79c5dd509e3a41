/* The smallest vhost-user peers there can be: "serve PATH" answers GET_FEATURES of one front-end, "ask PATH N" asks N
 * times and prints how many nanoseconds that took. What else a front-end says is read and needs no answer. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { GET_FEATURES = 1, VERSION = 1, REPLY = 4 };
struct message {
	uint32_t request, flags, size;
	uint64_t payload;
} __attribute__((packed));
enum { HEADER = 12 };

static int all(int fd, void *to, size_t size)
{
	return recv(fd, to, size, MSG_WAITALL) == (ssize_t)size;
}

static int serve(int listener)
{
	struct message m;
	int fd;

	listen(listener, 1);
	puts("listening");
	fflush(stdout);
	fd = accept(listener, NULL, NULL);
	while (all(fd, &m, HEADER)) {
		if (m.size && !all(fd, &m.payload, m.size))
			return 1;
		if (m.request != GET_FEATURES)
			continue;
		m = (struct message){GET_FEATURES, VERSION | REPLY, 8, 1ull << 32};
		if (send(fd, &m, sizeof m, 0) != sizeof m)
			return 1;
	}
	return 0;
}

static int ask(int fd, long times)
{
	struct timespec begin, end;
	struct message m;

	clock_gettime(CLOCK_MONOTONIC, &begin);
	for (long i = 0; i < times; i++) {
		m = (struct message){GET_FEATURES, VERSION, 0, 0};
		if (send(fd, &m, HEADER, 0) != HEADER || !all(fd, &m, HEADER) || !all(fd, &m.payload, m.size))
			return 1;
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%lld\n", (end.tv_sec - begin.tv_sec) * 1000000000ll + end.tv_nsec - begin.tv_nsec);
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	if (argc < 3)
		return 2;
	strncpy(at.sun_path, argv[2], sizeof at.sun_path - 1);
	if (!strcmp(argv[1], "serve"))
		return bind(fd, (struct sockaddr *)&at, sizeof at) ? 1 : serve(fd);
	return connect(fd, (struct sockaddr *)&at, sizeof at) ? 1 : ask(fd, atol(argv[3]));
}
