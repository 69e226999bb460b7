/* Records what a process does to the files below one folder, in the order in which it does it. Loaded with LD_PRELOAD.
 *
 * POWERCUT_ROOT names the folder (absolute), POWERCUT_TRACE the file that the record is appended to. Each call is recorded under one
 * lock together with the call itself, so the order of the record is the order of the effects, over all threads. Writes are
 * recorded before they happen (from then on the disk may hold them), syncs after they have returned. A write to stdout is an
 * acknowledgement: recorded before anybody can read it. What maps files (the -shm file) is not seen; it does not survive anyway.
 *
 * `powercut_begin` starts a new record in the same process. `powercut_fail` makes the disk fail at the n-th call from now: ONCE,
 * once after HALF of a write, or from then on FOR_GOOD. A call that failed has done nothing and is not recorded, but for a sync,
 * which is recorded as failed.
 *
 * One record: {char op, 3 bytes pad, int32 fd, int64 offset, int32 length of text, int32 length of data}, text, data.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define FDS 4096
#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char tracked[FDS];
static char root[4096];
static size_t root_length;
static int trace = -1;
static long countdown; /* 0: no failure is to come */
static int failure;
enum { ONCE, HALF, FOR_GOOD };
static int manner;
static long calls;

struct head { char op; char pad[3]; int32_t fd; int64_t offset; int32_t text; int32_t data; };

void powercut_begin(const char *folder, const char *path) {
    if (trace >= 0) ((int (*)(int))dlsym(RTLD_NEXT, "close"))(trace);
    memset(tracked, 0, sizeof tracked);
    if (strlen(folder) >= sizeof root) abort();
    strcpy(root, folder);
    root_length = strlen(root);
    trace = ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open"))(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (trace < 0) abort();
}

void powercut_fail(long nth, int error, int how) { countdown = nth, failure = error, manner = how, calls = 0; }

long powercut_calls(void) { return calls; }

__attribute__((constructor)) static void begin(void) {
    const char *folder = getenv("POWERCUT_ROOT"), *path = getenv("POWERCUT_TRACE");
    if (folder && path) powercut_begin(folder, path);
}

/* Whether this call is the one that fails. */
static int fails(void) {
    calls++;
    if (!countdown || --countdown) return 0;
    if (manner == FOR_GOOD) countdown = 1;
    errno = failure;
    return 1;
}

/* How much of a write is done. A short one is no error yet; the next call meets the full disk. */
static size_t done(size_t length) {
    if (!fails()) return length;
    if (manner != HALF) return 0;
    manner = ONCE, countdown = 1;
    return length / 2;
}

static int inside(const char *path) {
    return trace >= 0 && path && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int ours(int fd) { return trace >= 0 && fd >= 0 && fd < FDS && tracked[fd]; }

static void record(char op, int fd, int64_t offset, const char *text, const void *data, size_t length) {
    struct head head = {op, {0, 0, 0}, fd, offset, text ? (int32_t)strlen(text) : 0, (int32_t)length};
    struct iovec parts[3] = {{&head, sizeof head}, {(void *)text, (size_t)head.text}, {(void *)data, length}};
    if (writev(trace, parts, 3) != (ssize_t)(sizeof head + head.text + length)) abort(); /* half a record is no record */
}

static int opened(int fd, const char *path, int flags, int existed) {
    if (fd < 0) return fd;
    if (fd >= FDS) abort();
    tracked[fd] = 1;
    record('o', fd, (flags & O_TRUNC) ? 1 : 0, path, existed ? "" : "new", existed ? 0 : 3);
    return fd;
}

#define OPEN(name)                                                                                         \
    int name(const char *path, int flags, ...) {                                                           \
        mode_t mode = 0;                                                                                   \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                               \
            va_list list;                                                                                  \
            va_start(list, flags);                                                                         \
            mode = va_arg(list, mode_t);                                                                   \
            va_end(list);                                                                                  \
        }                                                                                                  \
        int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);    \
        if (!inside(path)) {                                                                               \
            int fd = real(path, flags, mode);                                                              \
            if (fd >= 0 && fd < FDS) tracked[fd] = 0;                                                      \
            return fd;                                                                                     \
        }                                                                                                  \
        pthread_mutex_lock(&lock);                                                                         \
        struct stat found;                                                                                 \
        int existed = lstat(path, &found) == 0;                                                            \
        int fd = (flags & O_CREAT) && !existed && fails() ? -1 : opened(real(path, flags, mode), path, flags, existed); \
        pthread_mutex_unlock(&lock);                                                                       \
        return fd;                                                                                         \
    }
OPEN(open)
OPEN(open64)

int close(int fd) {
    REAL(close);
    if (!ours(fd)) return real(fd);
    pthread_mutex_lock(&lock);
    tracked[fd] = 0;
    record('c', fd, 0, NULL, NULL, 0);
    int result = real(fd);
    pthread_mutex_unlock(&lock);
    return result;
}

#define PWRITE(name, offset_type)                                                          \
    ssize_t name(int fd, const void *data, size_t length, offset_type offset) {            \
        REAL(name);                                                                        \
        if (!ours(fd)) return real(fd, data, length, offset);                              \
        pthread_mutex_lock(&lock);                                                         \
        ssize_t result = -1;                                                               \
        length = done(length);                                                             \
        if (length) {                                                                      \
            record('w', fd, offset, NULL, data, length);                                   \
            result = real(fd, data, length, offset);                                       \
            if (result != (ssize_t)length) abort(); /* the record would say too much */    \
        }                                                                                  \
        pthread_mutex_unlock(&lock);                                                       \
        return result;                                                                     \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *data, size_t length) {
    REAL(write);
    if (fd != 1 && !ours(fd)) return real(fd, data, length);
    if (trace < 0) return real(fd, data, length);
    pthread_mutex_lock(&lock);
    ssize_t result = -1;
    if (fd == 1 || !fails()) {
        if (fd == 1) record('a', fd, 0, NULL, data, length);
        else record('w', fd, lseek(fd, 0, SEEK_CUR), NULL, data, length);
        result = real(fd, data, length);
        if (result != (ssize_t)length) abort();
    }
    pthread_mutex_unlock(&lock);
    return result;
}

#define TRUNCATE(name, offset_type)                       \
    int name(int fd, offset_type length) {                \
        REAL(name);                                       \
        if (!ours(fd)) return real(fd, length);           \
        pthread_mutex_lock(&lock);                        \
        int result = -1;                                  \
        if (!fails()) {                                   \
            record('t', fd, length, NULL, NULL, 0);       \
            result = real(fd, length);                    \
        }                                                 \
        pthread_mutex_unlock(&lock);                      \
        return result;                                    \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define SYNC(name)                                        \
    int name(int fd) {                                    \
        REAL(name);                                       \
        if (!ours(fd)) return real(fd);                   \
        pthread_mutex_lock(&lock);                        \
        int result = fails() ? -1 : real(fd);             \
        record(result ? 'f' : 's', fd, 0, NULL, NULL, 0); \
        pthread_mutex_unlock(&lock);                      \
        return result;                                    \
    }
SYNC(fsync)
SYNC(fdatasync)

int rename(const char *from, const char *to) {
    REAL(rename);
    if (!inside(from) && !inside(to)) return real(from, to);
    pthread_mutex_lock(&lock);
    int result = fails() ? -1 : real(from, to);
    if (result == 0) record('r', -1, 0, from, to, strlen(to));
    pthread_mutex_unlock(&lock);
    return result;
}

#define BY_NAME(name, op, parameters, arguments)          \
    int name parameters {                                 \
        REAL(name);                                       \
        if (!inside(path)) return real arguments;         \
        pthread_mutex_lock(&lock);                        \
        int result = fails() ? -1 : real arguments;       \
        if (result == 0) record(op, -1, 0, path, NULL, 0); \
        pthread_mutex_unlock(&lock);                      \
        return result;                                    \
    }
BY_NAME(unlink, 'u', (const char *path), (path))
BY_NAME(mkdir, 'm', (const char *path, mode_t mode), (path, mode))
