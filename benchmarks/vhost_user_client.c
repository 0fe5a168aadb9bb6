/* A vhost-user front-end that does random 4 KiB requests as fast as it can: one queue, a fixed number of requests under
 * way, event index, indirect descriptors, as a Linux guest would.
 *
 *     vhost_user_client SOCKET read|write DEPTH SECONDS SIZE     prints requests per second
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MEMORY (64u << 20)
#define GUEST 0x100000000ull
#define RING 256
#define BLOCK 4096

struct message {
    uint32_t request, flags, size;
    union {
        uint64_t u64;
        struct { uint32_t index, num; } state;
        struct { uint32_t index, flags; uint64_t desc, used, avail, log; } addr;
        struct { uint32_t count, padding; uint64_t guest, size, user, offset; } table;
    };
} __attribute__((packed));

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct avail { uint16_t flags, idx, ring[RING], used_event; };
struct used { uint16_t flags, idx; struct { uint32_t id, len; } ring[RING]; uint16_t avail_event; };

static int sock;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void tell(struct message *m, uint32_t request, uint32_t size, int fd)
{
    char control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct iovec iov = { m, 12 + size };
    struct msghdr h = { .msg_iov = &iov, .msg_iovlen = 1 };

    m->request = request;
    m->flags = 1;
    m->size = size;
    if (fd >= 0) {
        h.msg_control = control;
        h.msg_controllen = sizeof(control);
        struct cmsghdr *c = CMSG_FIRSTHDR(&h);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof(int));
    }
    if (sendmsg(sock, &h, 0) < 0)
        fail("sendmsg");
}

static uint64_t ask(uint32_t request)
{
    struct message m = { 0 };

    tell(&m, request, 0, -1);
    if (recv(sock, &m, 20, MSG_WAITALL) != 20)
        fail("recv");
    return m.u64;
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

int main(int argc, char **argv)
{
    if (argc != 6)
        return 2;
    int writing = !strcmp(argv[2], "write"), depth = atoi(argv[3]);
    double seconds = atof(argv[4]);
    uint64_t blocks = strtoull(argv[5], NULL, 10) / BLOCK;
    struct sockaddr_un name = { .sun_family = AF_UNIX };
    struct message m = { 0 };

    strncpy(name.sun_path, argv[1], sizeof(name.sun_path) - 1);
    sock = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(sock, (struct sockaddr *)&name, sizeof(name)))
        fail("connect");
    int fd = memfd_create("guest", 0);
    if (fd < 0 || ftruncate(fd, MEMORY))
        fail("memfd");
    char *mem = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mem == MAP_FAILED)
        fail("mmap");
    memset(mem, 0x5a, MEMORY);
    memset(mem, 0, 65536);
    struct desc *desc = (void *)mem;
    struct avail *avail = (void *)(mem + 8192);
    struct used *used = (void *)(mem + 16384);
    int kick = eventfd(0, EFD_NONBLOCK), call = eventfd(0, 0);

    tell(&m, 3, 0, -1);
    m.u64 = ask(1) & (1ull << 32 | 1ull << 30 | 1ull << 29 | 1ull << 28 | 1ull << 9);
    tell(&m, 2, 8, -1);
    m.table.count = 1;
    m.table.padding = 0;
    m.table.guest = GUEST;
    m.table.size = MEMORY;
    m.table.user = (uintptr_t)mem;
    m.table.offset = 0;
    tell(&m, 5, 40, fd);
    m.state.index = 0;
    m.state.num = RING;
    tell(&m, 8, 8, -1);
    m.state.num = 0;
    tell(&m, 10, 8, -1);
    m.addr.index = m.addr.flags = 0;
    m.addr.desc = (uintptr_t)desc;
    m.addr.used = (uintptr_t)used;
    m.addr.avail = (uintptr_t)avail;
    m.addr.log = 0;
    tell(&m, 9, 40, -1);
    m.u64 = 0;
    tell(&m, 13, 8, call);
    m.u64 = 0;
    tell(&m, 12, 8, kick);
    m.state.index = 0;
    m.state.num = 1;
    tell(&m, 18, 8, -1);
    ask(1);

    uint64_t seed = 88172645463325252ull, done = 0;
    uint16_t next = 0, seen = 0;
    int under_way = 0, stopping = 0;
    double start = now(), end = start + seconds;

    /* A request's things are at 1 MiB + 16 KiB * its number: table, header, status, data. */
    for (int i = 0; i < depth; i++) {
        char *place = mem + (1 << 20) + (i << 14);
        struct desc *table = (void *)place;
        uint64_t at = GUEST + (place - mem);

        table[0] = (struct desc){ at + 64, 16, 1, 1 };
        table[1] = (struct desc){ at + 4096, BLOCK, writing ? 1 : 3, 2 };
        table[2] = (struct desc){ at + 128, 1, 2, 0 };
        desc[i] = (struct desc){ at, 48, 4, 0 };
    }
    int *free_list = malloc(sizeof(int) * depth), free_count = depth;
    for (int i = 0; i < depth; i++)
        free_list[i] = i;
    while (!stopping || under_way) {
        uint16_t before = next;
        while (free_count && !stopping) {
            int i = free_list[--free_count];
            struct { uint32_t type, reserved; uint64_t sector; } *header = (void *)(mem + (1 << 20) + (i << 14) + 64);

            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            header->type = writing;
            header->sector = seed % blocks * (BLOCK / 512);
            mem[(1 << 20) + (i << 14) + 128] = (char)0xff;
            avail->ring[next++ % RING] = i;
            under_way++;
        }
        if (next != before) {
            __atomic_store_n(&avail->idx, next, __ATOMIC_RELEASE);
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            if ((uint16_t)(next - used->avail_event - 1) < (uint16_t)(next - before))
                eventfd_write(kick, 1);
        }
        avail->used_event = seen;
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (__atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) == seen) {
            eventfd_t value;
            eventfd_read(call, &value);
        }
        while (__atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) != seen) {
            int i = used->ring[seen++ % RING].id;

            if (mem[(1 << 20) + (i << 14) + 128]) {
                fprintf(stderr, "a request failed\n");
                return 1;
            }
            free_list[free_count++] = i;
            under_way--;
            done++;
        }
        if (!stopping && now() >= end)
            stopping = 1;
    }
    printf("%.0f\n", done / (now() - start));
    return 0;
}
