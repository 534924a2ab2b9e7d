/*
 * vhost-user as a front end speaks it: one message out, and its reply if it has one (QEMU,
 * docs/interop/vhost-user.rst).  Every failure ends the process: see die().
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static const int DEADLINE_MS = 10000;

/* Messages, by their numbers. */
enum {
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9, SET_VRING_BASE = 10, GET_VRING_BASE = 11, SET_VRING_KICK = 12,
    SET_VRING_CALL = 13, GET_PROTOCOL_FEATURES = 15, SET_PROTOCOL_FEATURES = 16,
    SET_VRING_ENABLE = 18, GET_CONFIG = 24,
};
#define VERSION_FLAG 1u
#define REPLY_FLAG 4u
#define F_PROTOCOL_FEATURES (1ull << 30)
#define PROTOCOL_F_CONFIG (1ull << 9)
#define F_VERSION_1 (1ull << 32)

static void die(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fputs("ring_driver: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    exit(1);
}

struct message {
    uint32_t request, flags, size;
    uint8_t payload[256];
} __attribute__((packed));

static void send_message(int sock, uint32_t request, const void *payload, uint32_t size, int fd)
{
    struct message message = { .request = request, .flags = VERSION_FLAG, .size = size };
    struct iovec iov = { &message, 12 + size };
    union { char room[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = { .room = { 0 } };
    struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1 };

    memcpy(message.payload, payload, size);
    if (fd >= 0) {
        header.msg_control = control.room;
        header.msg_controllen = sizeof control.room;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    }
    if (sendmsg(sock, &header, MSG_NOSIGNAL) != (ssize_t)(12 + size))
        die("message %u: the back end has gone (%s)", request, strerror(errno));
}

static void read_exactly(int sock, void *into, size_t size)
{
    for (size_t done = 0; done < size;) {
        struct pollfd ready = { .fd = sock, .events = POLLIN };
        if (poll(&ready, 1, DEADLINE_MS) != 1)
            die("the back end does not reply");
        ssize_t got = read(sock, (uint8_t *)into + done, size - done);
        if (got <= 0)
            die("the back end has closed the connection");
        done += got;
    }
}

static void receive_reply(int sock, uint32_t request, void *into, uint32_t size)
{
    struct message reply;

    read_exactly(sock, &reply, 12);
    if (reply.request != request || !(reply.flags & REPLY_FLAG) || reply.size != size)
        die("reply to %u: request %u, flags %#x, %u bytes", request, reply.request, reply.flags,
            reply.size);
    read_exactly(sock, into, size);
}

static uint64_t get_u64(int sock, uint32_t request)
{
    uint64_t value;

    send_message(sock, request, "", 0, -1);
    receive_reply(sock, request, &value, sizeof value);
    return value;
}

static void set_u64(int sock, uint32_t request, uint64_t value, int fd)
{
    send_message(sock, request, &value, sizeof value, fd);
}

static void set_ring(int sock, uint32_t request, uint32_t value)
{
    struct { uint32_t index, num; } state = { 0, value }; /* ring 0 */

    send_message(sock, request, &state, sizeof state, -1);
}

static uint64_t capacity_sectors(int sock)
{
    struct { uint32_t offset, size, flags; uint8_t room[8]; } __attribute__((packed)) config =
        { 0, 8, 0, { 0 } };
    uint64_t sectors;

    send_message(sock, GET_CONFIG, &config, sizeof config, -1);
    receive_reply(sock, GET_CONFIG, &config, sizeof config);
    memcpy(&sectors, config.room, sizeof sectors);
    return sectors;
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (strlen(path) >= sizeof address.sun_path)
        die("%s: the path is too long for a socket", path);
    strcpy(address.sun_path, path);
    if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof address) < 0)
        die("%s: %s", path, strerror(errno));
    return sock;
}
