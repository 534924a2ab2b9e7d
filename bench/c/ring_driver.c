/*
 * The driver half of virtio-blk, in C, against any vhost-user-blk back end: what the back end alone
 * can do, with no guest and no VMM in the way.
 *
 *   ring_driver SOCKET read|write random|sequential DEPTH SECONDS
 *
 * It does what Linux's driver does (virtio_blk.c, virtio_ring.c): a split virtqueue, a request in
 * one indirect table (header, 4 KiB, status), EVENT_IDX both ways, sleeping on the call eventfd
 * when nothing is done, and as many new requests in one go as have just been completed.
 *
 * Each 4 KiB block holds its own number in its first eight bytes.  The disk is filled like that
 * before the clock starts, and what is read is checked, so a back end cannot be fast by being
 * wrong.  One line comes out:
 *
 *   requests N seconds S median_ns N p99_ns N indirect 0|1 event_idx 0|1
 *
 * median_ns and p99_ns are of one request's time from being made available to being seen used.
 * Any failure is a line on standard error and status 1.
 */
#include "vhost_user.h"

#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>

enum { QUEUE_SIZE = 128, BLOCK = 4096, SECTORS = BLOCK / 512, MAX_SAMPLES = 1 << 20 };

/* All that is shared with the back end: the ring, and for each request what its table points to. */
struct request {
    struct vring_desc table[3];
    struct virtio_blk_outhdr header;
    uint8_t status;
} __attribute__((aligned(128)));

struct shared {
    struct vring_desc desc[QUEUE_SIZE];
    uint8_t avail[4096] __attribute__((aligned(4096)));
    uint8_t used[4096] __attribute__((aligned(4096)));
    struct request requests[QUEUE_SIZE] __attribute__((aligned(4096)));
    uint8_t data[QUEUE_SIZE][BLOCK] __attribute__((aligned(4096)));
};

struct driver {
    struct shared *mem;
    struct vring_avail *avail;
    struct vring_used *used;
    volatile uint16_t *used_event, *avail_event;
    int kick, call, indirect, event_idx;
    uint16_t published, notified, seen;
    uint64_t blocks;
    uint64_t submitted_ns[QUEUE_SIZE];
};

static uint64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

/* The handshake: afterwards the back end serves the ring.  Addresses of the guest are ours. */
static int connect_driver(struct driver *driver, const char *path)
{
    int memory = memfd_create("ring_driver", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    size_t size = (sizeof(struct shared) + BLOCK - 1) & -(size_t)BLOCK;
    int sock = connect_to(path);

    /* Sealed, for back ends that serve only memory that cannot be shrunk under them. */
    if (memory < 0 || ftruncate(memory, size) < 0 ||
        fcntl(memory, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        die("memory: %s", strerror(errno));
    driver->mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (driver->mem == MAP_FAILED)
        die("memory: %s", strerror(errno));
    driver->avail = (void *)driver->mem->avail;
    driver->used = (void *)driver->mem->used;
    driver->used_event = &driver->avail->ring[QUEUE_SIZE];
    driver->avail_event = (void *)&driver->used->ring[QUEUE_SIZE];

    uint64_t offered = get_u64(sock, GET_FEATURES);
    if (!(offered & F_VERSION_1) || !(offered & F_PROTOCOL_FEATURES))
        die("the back end offers features %#llx only", (unsigned long long)offered);
    send_message(sock, SET_OWNER, "", 0, -1);
    if (!(get_u64(sock, GET_PROTOCOL_FEATURES) & PROTOCOL_F_CONFIG))
        die("the back end has no configuration space");
    set_u64(sock, SET_PROTOCOL_FEATURES, PROTOCOL_F_CONFIG, -1);
    /* With FLUSH the cache is write-back, as for Linux; without, each write would be a flush. */
    uint64_t wanted = offered & (F_VERSION_1 | F_PROTOCOL_FEATURES | 1ull << VIRTIO_BLK_F_FLUSH |
        1ull << VIRTIO_BLK_F_CONFIG_WCE | 1ull << VIRTIO_RING_F_INDIRECT_DESC |
        1ull << VIRTIO_RING_F_EVENT_IDX);
    set_u64(sock, SET_FEATURES, wanted, -1);
    driver->indirect = wanted >> VIRTIO_RING_F_INDIRECT_DESC & 1;
    driver->event_idx = wanted >> VIRTIO_RING_F_EVENT_IDX & 1;
    driver->blocks = capacity_sectors(sock) / SECTORS;
    if (!driver->blocks)
        die("the disk is empty");

    struct { uint32_t count, padding; uint64_t gpa, size, user, offset; } table = {
        1, 0, (uintptr_t)driver->mem, size, (uintptr_t)driver->mem, 0 };
    send_message(sock, SET_MEM_TABLE, &table, sizeof table, memory);
    close(memory);
    driver->kick = eventfd(0, EFD_CLOEXEC);
    driver->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    set_ring(sock, SET_VRING_NUM, QUEUE_SIZE);
    set_ring(sock, SET_VRING_BASE, 0);
    struct { uint32_t index, flags; uint64_t desc, used, avail, log; } ring = {
        0, 0, (uintptr_t)driver->mem->desc, (uintptr_t)driver->used, (uintptr_t)driver->avail, 0 };
    send_message(sock, SET_VRING_ADDR, &ring, sizeof ring, -1);
    set_u64(sock, SET_VRING_CALL, 0, driver->call);
    set_u64(sock, SET_VRING_KICK, 0, driver->kick);
    set_ring(sock, SET_VRING_ENABLE, 1);
    return sock;
}

/* ---- The virtqueue. ---- */

/* Request i always uses the same table, header, block of data and descriptors. */
static void prepare(struct driver *driver)
{
    for (unsigned i = 0; i < QUEUE_SIZE; i++) {
        struct request *request = &driver->mem->requests[i];
        struct vring_desc parts[3] = {
            { (uintptr_t)&request->header, sizeof request->header, VRING_DESC_F_NEXT, 1 },
            { (uintptr_t)driver->mem->data[i], BLOCK, VRING_DESC_F_NEXT, 2 },
            { (uintptr_t)&request->status, 1, VRING_DESC_F_WRITE, 0 },
        };
        memcpy(request->table, parts, sizeof parts);
        if (driver->indirect)
            driver->mem->desc[i] = (struct vring_desc){
                (uintptr_t)request->table, sizeof request->table, VRING_DESC_F_INDIRECT, 0 };
        else
            for (unsigned part = 0; part < 3 && i < QUEUE_SIZE / 3; part++) {
                struct vring_desc *desc = &driver->mem->desc[3 * i + part];
                *desc = parts[part];
                desc->next += 3 * i;
            }
    }
}

/* Put request i for `block` into the ring; publish() shows it to the back end. */
static void enqueue(struct driver *driver, unsigned i, int write, uint64_t block)
{
    struct request *request = &driver->mem->requests[i];
    struct vring_desc *data = driver->indirect ? &request->table[1] : &driver->mem->desc[3 * i + 1];

    request->header.type = write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN;
    request->header.sector = block * SECTORS;
    request->status = 0xff;
    memcpy(driver->mem->data[i], &(uint64_t){ write ? block : ~block }, 8);
    data->flags = VRING_DESC_F_NEXT | (write ? 0 : VRING_DESC_F_WRITE);
    driver->avail->ring[driver->published++ % QUEUE_SIZE] = driver->indirect ? i : 3 * i;
}

/* Make all enqueued requests available, and kick if the back end wants that for any of them. */
static void publish(struct driver *driver)
{
    uint16_t to = driver->published, from = driver->notified;
    int wanted;

    __atomic_store_n(&driver->avail->idx, to, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (driver->event_idx)
        wanted = vring_need_event(*driver->avail_event, to, from);
    else
        wanted = !(*(volatile uint16_t *)&driver->used->flags & VRING_USED_F_NO_NOTIFY);
    driver->notified = to;
    if (wanted && write(driver->kick, &(uint64_t){ 1 }, 8) != 8)
        die("kick: %s", strerror(errno));
}

static uint16_t used_idx(const struct driver *driver)
{
    return __atomic_load_n(&driver->used->idx, __ATOMIC_ACQUIRE);
}

/* Sleep until something is used: ask for an interrupt, look again, then wait for the eventfd. */
static void wait_for_used(struct driver *driver)
{
    uint64_t ignored;

    while (used_idx(driver) == driver->seen) {
        *driver->used_event = driver->seen;
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (used_idx(driver) != driver->seen)
            return;
        struct pollfd ready = { .fd = driver->call, .events = POLLIN };
        if (poll(&ready, 1, DEADLINE_MS) != 1)
            die("no request has been completed for %d s", DEADLINE_MS / 1000);
        if (read(driver->call, &ignored, 8) != 8 && errno != EAGAIN)
            die("call: %s", strerror(errno));
    }
}

/* The next used request's number, checked: its status, and what was read. */
static unsigned harvest(struct driver *driver)
{
    unsigned id = driver->used->ring[driver->seen++ % QUEUE_SIZE].id;
    unsigned i = driver->indirect ? id : id / 3;

    if (i >= QUEUE_SIZE)
        die("the back end used descriptor %u", id);
    struct request *request = &driver->mem->requests[i];
    uint64_t block = request->header.sector / SECTORS, found;
    memcpy(&found, driver->mem->data[i], 8);
    if (request->status != VIRTIO_BLK_S_OK)
        die("block %llu: status %u", (unsigned long long)block, request->status);
    if (found != block)
        die("block %llu: not what was written there", (unsigned long long)block);
    return i;
}

static uint64_t next_block(uint64_t *state, int random, uint64_t blocks)
{
    if (!random)
        return (*state)++ % blocks;
    *state ^= *state << 13; /* xorshift64 */
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state % blocks;
}

/*
 * Keep `depth` requests in flight until `limit` have been made or `seconds` are over; the number
 * completed.  Latencies go to `samples`, as a ring if there are more than MAX_SAMPLES.
 */
static uint64_t keep_busy(struct driver *driver, int write, int random, unsigned depth,
                          uint64_t limit, double seconds, uint32_t *samples)
{
    uint64_t state = random ? 88172645463325252ull : 0, made = 0, done = 0;
    uint64_t until = now_ns() + (uint64_t)(seconds * 1e9), time = now_ns();

    for (; made < depth && made < limit; made++) {
        driver->submitted_ns[made] = time;
        enqueue(driver, made, write, next_block(&state, random, driver->blocks));
    }
    publish(driver);
    while (done < made) {
        uint64_t before = made;
        wait_for_used(driver);
        time = now_ns();
        for (uint16_t end = used_idx(driver); driver->seen != end;) {
            unsigned i = harvest(driver);
            if (samples)
                samples[done % MAX_SAMPLES] = time - driver->submitted_ns[i];
            done++;
            if (made < limit && time < until) {
                driver->submitted_ns[i] = time;
                enqueue(driver, i, write, next_block(&state, random, driver->blocks));
                made++;
            }
        }
        if (made != before)
            publish(driver);
    }
    return done;
}

static int ascending(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    static struct driver driver;
    static uint32_t samples[MAX_SAMPLES];
    const double forever = 3600;

    if (argc != 6)
        die("usage: SOCKET read|write random|sequential DEPTH SECONDS");
    int write = !strcmp(argv[2], "write"), random = !strcmp(argv[3], "random");
    unsigned depth = atoi(argv[4]);
    double seconds = atof(argv[5]);
    if (depth < 1 || depth > QUEUE_SIZE / 3 || seconds <= 0)
        die("the depth is 1 to %d", QUEUE_SIZE / 3);

    int sock = connect_driver(&driver, argv[1]);
    prepare(&driver);
    keep_busy(&driver, 1, 0, 32, driver.blocks, forever, NULL);
    keep_busy(&driver, write, random, depth, UINT64_MAX, seconds / 5, NULL);
    uint64_t started = now_ns();
    uint64_t done = keep_busy(&driver, write, random, depth, UINT64_MAX, seconds, samples);
    double took = (now_ns() - started) / 1e9;
    set_ring(sock, GET_VRING_BASE, 0);
    struct { uint32_t index, num; } base;
    receive_reply(sock, GET_VRING_BASE, &base, sizeof base);

    size_t kept = done < MAX_SAMPLES ? done : MAX_SAMPLES;
    qsort(samples, kept, sizeof *samples, ascending);
    printf("requests %llu seconds %.6f median_ns %u p99_ns %u indirect %d event_idx %d\n",
           (unsigned long long)done, took, samples[kept / 2], samples[kept * 99 / 100],
           driver.indirect, driver.event_idx);
    return 0;
}
