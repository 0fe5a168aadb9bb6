/* The init of a guest that uses its disk /dev/vda: writes, flushes, reads, discards, zeroes; says how it went, and switches
 * the machine off. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MIB (1u << 20)

static void off(void)
{
    fflush(stdout);
    reboot(RB_POWER_OFF);
}

static void fail(const char *what)
{
    printf("GUEST failed: %s: %s\n", what, strerror(errno));
    off();
}

static void load(const char *name)
{
    char path[64];

    snprintf(path, sizeof(path), "/%s.ko", name);
    int fd = open(path, O_RDONLY);
    if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
        fail(name);
    close(fd);
}

static void tell(const char *name, const char *path)
{
    char text[64] = "?";
    int fd = open(path, O_RDONLY);

    if (fd >= 0) {
        ssize_t n = read(fd, text, sizeof(text) - 1);
        text[n > 0 ? n : 0] = 0;
        close(fd);
    }
    text[strcspn(text, "\n")] = 0;
    printf("GUEST %s: %s\n", name, text);
}

int main(void)
{
    const char *modules[] = { "virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
                              "virtio_blk" };
    unsigned char *data, *back;
    uint64_t size = 0, range[2];
    uint32_t seed = 1;
    int fd = -1;

    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    for (size_t i = 0; i < sizeof(modules) / sizeof(*modules); i++)
        load(modules[i]);
    for (int i = 0; i < 400 && (fd = open("/dev/vda", O_RDWR | O_DIRECT)) < 0; i++)
        usleep(50000);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size))
        fail("open");
    printf("GUEST size: %llu\n", (unsigned long long)size);
    tell("serial", "/sys/block/vda/serial");
    tell("cache", "/sys/block/vda/queue/write_cache");
    tell("discard", "/sys/block/vda/queue/discard_max_bytes");
    if (posix_memalign((void **)&data, 4096, MIB) || posix_memalign((void **)&back, 4096, MIB))
        fail("memory");
    /* Every MiB in an order of its own; the byte at I is determined by I, so that the host can check. */
    for (unsigned step = 0; step < size / MIB; step++) {
        off_t at = (off_t)(step * 37 % (size / MIB)) * MIB;

        seed = at / MIB + 1;
        for (size_t i = 0; i < MIB; i++) {
            seed = seed * 1103515245 + 12345;
            data[i] = seed >> 16;
        }
        if (pwrite(fd, data, MIB, at) != MIB)
            fail("write");
        if (step % 8 == 0 && fsync(fd))
            fail("fsync");
        if (pread(fd, back, MIB, at) != MIB || memcmp(data, back, MIB))
            fail("read back");
    }
    range[0] = 5 * MIB;
    range[1] = MIB;
    if (ioctl(fd, BLKDISCARD, range))
        fail("discard");
    range[0] = 6 * MIB;
    if (ioctl(fd, BLKZEROOUT, range))
        fail("zeroes");
    memset(data, 0, MIB);
    if (pread(fd, back, MIB, 6 * MIB) != MIB || memcmp(data, back, MIB))
        fail("read zeroes");
    for (unsigned i = 0; i < 2000; i++)
        if (pread(fd, back, 4096, (off_t)(i * 7919 % (size / 4096)) * 4096) != 4096)
            fail("read 4k");
    if (fsync(fd))
        fail("fsync");
    printf("GUEST done\n");
    off();
}
