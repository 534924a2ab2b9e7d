/* A tar header's checksum and numbers. */
#include <errno.h>
#include "agent.h"
#include "tar.h"

unsigned checksum(const uint8_t *header)
{
	unsigned sum = 8 * ' ';
	for (int i = 0; i < 512; i++)
		sum += i >= SUM && i < SUM + 8 ? 0 : header[i];
	return sum;
}

/* Octal, or in the GNU way a binary number where that is too short or cannot be negative. */
void put_number(uint8_t *p, int length, int64_t value)
{
	if (value >= 0 && (length > 11 ? value < 1LL << 33 : value < 1LL << 3 * (length - 1))) {
		for (p[length - 1] = 0; --length > 0; value >>= 3)
			p[length - 1] = '0' + (value & 7);
		return;
	}
	uint64_t bits = value;
	for (int i = length - 1; i > 0; i--) {
		p[i] = bits;
		bits = bits >> 8 | (value < 0 ? 0xffULL << 56 : 0);
	}
	p[0] = value < 0 ? 0xff : 0x80;
}

int64_t get_number(const uint8_t *p, int length)
{
	uint64_t value = 0;
	int i = 0;
	if (p[0] & 0x80) {
		value = p[0] & 0x40 ? -1 : p[0] & 0x3f;
		for (i = 1; i < length; i++)
			value = value << 8 | p[i];
		return value;
	}
	while (i < length && p[i] == ' ')
		i++;
	for (; i < length && p[i] >= '0' && p[i] <= '7'; i++)
		value = value << 3 | (p[i] - '0');
	if (i < length && p[i] && p[i] != ' ')
		fail(EINVAL, "the tar stream has a number that is none");
	return value;
}
