/* Records what a process does to the files below one folder, in the order in which it does it. Loaded with LD_PRELOAD.
 *
 * POWERCUT_ROOT names the folder (absolute), POWERCUT_TRACE the file that the record is appended to. Each call is recorded under one
 * lock together with the call itself, so the order of the record is the order of the effects, over all threads. Writes are
 * recorded before they happen (from then on the disk may hold them), syncs after they have returned. A write to stdout is an
 * acknowledgement: recorded before anybody can read it. What maps files (the -shm file) is not seen; it does not survive anyway.
 *
 * One record: {char op, 3 bytes pad, int32 fd, int64 offset, int32 length of text, int32 length of data}, text, data.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
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
static const char *root;
static size_t root_length;
static int trace = -1;

struct head { char op; char pad[3]; int32_t fd; int64_t offset; int32_t text; int32_t data; };

__attribute__((constructor)) static void begin(void) {
    root = getenv("POWERCUT_ROOT");
    const char *path = getenv("POWERCUT_TRACE");
    if (!root || !path) return;
    root_length = strlen(root);
    int (*real_open)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open");
    trace = real_open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
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
        int fd = opened(real(path, flags, mode), path, flags, existed);                                    \
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
        record('w', fd, offset, NULL, data, length);                                       \
        ssize_t result = real(fd, data, length, offset);                                   \
        if (result != (ssize_t)length) abort(); /* the record would say too much */        \
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
    if (fd == 1) record('a', fd, 0, NULL, data, length);
    else record('w', fd, lseek(fd, 0, SEEK_CUR), NULL, data, length);
    ssize_t result = real(fd, data, length);
    if (result != (ssize_t)length) abort();
    pthread_mutex_unlock(&lock);
    return result;
}

#define TRUNCATE(name, offset_type)                       \
    int name(int fd, offset_type length) {                \
        REAL(name);                                       \
        if (!ours(fd)) return real(fd, length);           \
        pthread_mutex_lock(&lock);                        \
        record('t', fd, length, NULL, NULL, 0);           \
        int result = real(fd, length);                    \
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
        int result = real(fd);                            \
        if (result == 0) record('s', fd, 0, NULL, NULL, 0); \
        pthread_mutex_unlock(&lock);                      \
        return result;                                    \
    }
SYNC(fsync)
SYNC(fdatasync)

int rename(const char *from, const char *to) {
    REAL(rename);
    if (!inside(from) && !inside(to)) return real(from, to);
    pthread_mutex_lock(&lock);
    int result = real(from, to);
    if (result == 0) record('r', -1, 0, from, to, strlen(to));
    pthread_mutex_unlock(&lock);
    return result;
}

#define BY_NAME(name, op, parameters, arguments)          \
    int name parameters {                                 \
        REAL(name);                                       \
        if (!inside(path)) return real arguments;         \
        pthread_mutex_lock(&lock);                        \
        int result = real arguments;                      \
        if (result == 0) record(op, -1, 0, path, NULL, 0); \
        pthread_mutex_unlock(&lock);                      \
        return result;                                    \
    }
BY_NAME(unlink, 'u', (const char *path), (path))
BY_NAME(mkdir, 'm', (const char *path, mode_t mode), (path, mode))
