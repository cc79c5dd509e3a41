/* What the channel is measured against: "write N" writes N bytes as a back-end does; "splice OUT" and "copy OUT" move
 * standard input into the file OUT, by splice(2) through a pipe of 1 MiB, or by read and write of 1 MiB as QEMU does. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { STEP = 1 << 20 };
static char buffer[STEP];

static int write_out(long long left)
{
	memset(buffer, 'x', sizeof buffer);
	while (left > 0) {
		ssize_t count = write(1, buffer, left < STEP ? (size_t)left : STEP);
		if (count < 0)
			return 1;
		left -= count;
	}
	return 0;
}

int main(int argc, char **argv)
{
	int out;
	ssize_t count = 0;

	if (argc != 3)
		return 2;
	if (!strcmp(argv[1], "write"))
		return write_out(atoll(argv[2]));
	out = open(argv[2], O_WRONLY | O_CREAT | O_TRUNC, 0600);
	if (out < 0)
		return 1;
	if (!strcmp(argv[1], "splice")) {
		fcntl(0, F_SETPIPE_SZ, STEP);
		while ((count = splice(0, NULL, out, NULL, STEP, SPLICE_F_MOVE)) > 0)
			;
	} else {
		while ((count = read(0, buffer, STEP)) > 0)
			if (write(out, buffer, count) != count)
				return 1;
	}
	return count < 0;
}
