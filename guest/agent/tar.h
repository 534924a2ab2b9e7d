/* Shared by the files that read and write tar streams. */
#ifndef TAR_H
#define TAR_H

#include <stdint.h>
enum { NAME = 0, MODE = 100, UID = 108, GID = 116, SIZE = 124, MTIME = 136, SUM = 148, TYPE = 156,
       LINK = 157, MAGIC = 257, MAJOR = 329, MINOR = 337, PREFIX = 345 };

/* tar.c */

unsigned checksum(const uint8_t *header);
void put_number(uint8_t *p, int length, int64_t value);
int64_t get_number(const uint8_t *p, int length);

/* tar_path.c */

extern int base;		/* where a stream is unpacked */

void make_base(const char *path);
void resolve(const char *name, char *path);

#endif
