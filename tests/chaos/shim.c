/* Stands between a process and its kernel, as LD_PRELOAD: counts the calls by which it changes anything, ends it at one
 * of them by SIGKILL, lets those on the files of one directory fail, and steps its wall clock.
 *
 * KVMAGENT_SHIM names a file of `struct control`, shared with the test, which may change it at any time.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum { READS = 1, WRITES = 2, SYNCS = 4 };

struct control {
    _Atomic int64_t calls;   /* that were counted so far */
    _Atomic int64_t kill_at; /* the process is killed when so many have been counted; 0: never */
    _Atomic int64_t kinds;   /* of calls that fail: READS | WRITES | SYNCS */
    _Atomic int64_t error;   /* with this errno */
    _Atomic int64_t every;   /* one in so many */
    _Atomic int64_t seen;    /* calls that might have failed */
    _Atomic int64_t failed;  /* those that did */
    _Atomic int64_t ahead_s; /* what the wall clock is ahead */
    char directory[256];     /* of the files on which they do */
};

static struct control *control;

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("KVMAGENT_SHIM");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *memory = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0)
        close(fd);
    if (memory != MAP_FAILED)
        control = memory;
}

static void count(void)
{
    if (control && atomic_fetch_add(&control->calls, 1) + 1 == atomic_load(&control->kill_at))
        kill(getpid(), SIGKILL);
}

static int is_inside(int fd)
{
    char link[64], target[512];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0)
        return 0;
    target[length] = 0;
    return strncmp(target, control->directory, strlen(control->directory)) == 0;
}

static int fails(int kind, int fd)
{
    if (!control || !(atomic_load(&control->kinds) & kind) || !is_inside(fd))
        return 0;
    int64_t every = atomic_load(&control->every);
    if (every > 1 && (atomic_fetch_add(&control->seen, 1) + 1) % every)
        return 0;
    atomic_fetch_add(&control->failed, 1);
    errno = (int)atomic_load(&control->error);
    return 1;
}

/* The function that would have been called without this library. */
#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) \
        next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define STAND_IN(kind, counted, result, name, parameters, fd, arguments) \
    result name parameters \
    { \
        NEXT(name); \
        if (counted) \
            count(); \
        return kind && fails(kind, fd) ? (result)-1 : next arguments; \
    }

STAND_IN(READS, 0, ssize_t, pread, (int fd, void *to, size_t n, off_t at), fd, (fd, to, n, at))
STAND_IN(READS, 0, ssize_t, pread64, (int fd, void *to, size_t n, off64_t at), fd, (fd, to, n, at))
STAND_IN(WRITES, 1, ssize_t, pwrite, (int fd, const void *from, size_t n, off_t at), fd, (fd, from, n, at))
STAND_IN(WRITES, 1, ssize_t, pwrite64, (int fd, const void *from, size_t n, off64_t at), fd, (fd, from, n, at))
STAND_IN(WRITES, 1, ssize_t, write, (int fd, const void *from, size_t n), fd, (fd, from, n))
STAND_IN(WRITES, 1, int, ftruncate, (int fd, off_t n), fd, (fd, n))
STAND_IN(WRITES, 1, int, ftruncate64, (int fd, off64_t n), fd, (fd, n))
STAND_IN(SYNCS, 1, int, fsync, (int fd), fd, (fd))
STAND_IN(SYNCS, 1, int, fdatasync, (int fd), fd, (fd))
STAND_IN(0, 1, ssize_t, send, (int fd, const void *from, size_t n, int flags), fd, (fd, from, n, flags))
STAND_IN(0, 1, ssize_t, sendmsg, (int fd, const struct msghdr *message, int flags), fd, (fd, message, flags))
STAND_IN(0, 1, int, unlink, (const char *path), -1, (path))
STAND_IN(0, 1, int, rename, (const char *from, const char *to), -1, (from, to))

int clock_gettime(clockid_t clock, struct timespec *now)
{
    NEXT(clock_gettime);
    int result = next(clock, now);
    if (!result && control && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += atomic_load(&control->ahead_s);
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    NEXT(gettimeofday);
    int result = next(now, zone);
    if (!result && control)
        now->tv_sec += atomic_load(&control->ahead_s);
    return result;
}

time_t time(time_t *to)
{
    NEXT(time);
    time_t now = next(NULL) + (control ? atomic_load(&control->ahead_s) : 0);
    if (to)
        *to = now;
    return now;
}
