/* A library to preload: the n-th system call on files below one folder fails, as a broken or a full disk would let it.
 *
 * faults_watch(folder) chooses the folder; faults_arm(n, error, count) lets `count` calls fail from the n-th on;
 * faults_seen() says how many there have been since. Calls that only look at a name (stat) are counted, too.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define DESCRIPTORS 65536
static char prefix[PATH_MAX];
static size_t prefix_length;
static char watched[DESCRIPTORS];
static long first = -1, last = -1, seen, failed;
static int error_number;
static char failed_name[64];

void faults_watch(const char *folder) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    prefix_length = strlen(prefix);
    memset(watched, 0, sizeof watched);
}

void faults_arm(long n, int error, long count) {
    seen = failed = 0;
    failed_name[0] = 0;
    error_number = error;
    first = n;
    last = n + count - 1;
}

long faults_seen(void) { return seen; }
long faults_failed(void) { return failed; }
const char *faults_name(void) { return failed_name; }

static int fails(const char *name) {
    if (first < 0) return 0;
    seen++;
    if (seen < first || seen > last) return 0;
    if (!failed++) snprintf(failed_name, sizeof failed_name, "%s", name);
    errno = error_number;
    return 1;
}

static int is_watched(int descriptor) { return descriptor >= 0 && descriptor < DESCRIPTORS && watched[descriptor]; }

static int is_below(int folder, const char *path) {
    if (!prefix_length || !path) return 0;
    if (path[0] != '/') return folder != AT_FDCWD && is_watched(folder);
    return !strncmp(path, prefix, prefix_length) && (path[prefix_length] == '/' || !path[prefix_length]);
}

static int watch(int descriptor, int is_ours) {
    if (descriptor >= 0 && descriptor < DESCRIPTORS) watched[descriptor] = is_ours;
    return descriptor;
}

#define REAL(type, name, ...)                                      \
    static type (*real)(__VA_ARGS__);                              \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name);

#define OPEN(name)                                                       \
    int name(const char *path, int flags, ...) {                        \
        REAL(int, #name, const char *, int, ...)                        \
        va_list more;                                                   \
        va_start(more, flags);                                          \
        int mode = va_arg(more, int), ours = is_below(AT_FDCWD, path);  \
        va_end(more);                                                   \
        if (ours && fails(#name)) return -1;                            \
        return watch(real(path, flags, mode), ours);                    \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                     \
    int name(int folder, const char *path, int flags, ...) {            \
        REAL(int, #name, int, const char *, int, ...)                   \
        va_list more;                                                   \
        va_start(more, flags);                                          \
        int mode = va_arg(more, int), ours = is_below(folder, path);    \
        va_end(more);                                                   \
        if (ours && fails(#name)) return -1;                            \
        return watch(real(folder, path, flags, mode), ours);            \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int descriptor) {
    REAL(int, "close", int)
    int ours = is_watched(descriptor);
    watch(descriptor, 0);
    int result = real(descriptor); /* the descriptor is gone in any case */
    return ours && fails("close") ? -1 : result;
}

#define ON_DESCRIPTOR(type, name, parameters, arguments, bad, ...)      \
    type name parameters {                                              \
        REAL(type, #name, __VA_ARGS__)                                  \
        if (is_watched(descriptor) && fails(#name)) return bad;         \
        return real arguments;                                          \
    }
ON_DESCRIPTOR(ssize_t, read, (int descriptor, void *to, size_t size), (descriptor, to, size), -1, int, void *, size_t)
ON_DESCRIPTOR(ssize_t, pread, (int descriptor, void *to, size_t size, off_t at), (descriptor, to, size, at), -1, int, void *,
              size_t, off_t)
ON_DESCRIPTOR(ssize_t, pread64, (int descriptor, void *to, size_t size, off64_t at), (descriptor, to, size, at), -1, int,
              void *, size_t, off64_t)
ON_DESCRIPTOR(ssize_t, preadv, (int descriptor, const struct iovec *to, int size, off_t at), (descriptor, to, size, at), -1,
              int, const struct iovec *, int, off_t)
ON_DESCRIPTOR(ssize_t, preadv64, (int descriptor, const struct iovec *to, int size, off64_t at), (descriptor, to, size, at),
              -1, int, const struct iovec *, int, off64_t)
ON_DESCRIPTOR(ssize_t, write, (int descriptor, const void *from, size_t size), (descriptor, from, size), -1, int,
              const void *, size_t)
ON_DESCRIPTOR(ssize_t, pwrite, (int descriptor, const void *from, size_t size, off_t at), (descriptor, from, size, at), -1,
              int, const void *, size_t, off_t)
ON_DESCRIPTOR(ssize_t, pwrite64, (int descriptor, const void *from, size_t size, off64_t at), (descriptor, from, size, at),
              -1, int, const void *, size_t, off64_t)
ON_DESCRIPTOR(int, fsync, (int descriptor), (descriptor), -1, int)
ON_DESCRIPTOR(int, fdatasync, (int descriptor), (descriptor), -1, int)
ON_DESCRIPTOR(int, ftruncate, (int descriptor, off_t size), (descriptor, size), -1, int, off_t)
ON_DESCRIPTOR(int, ftruncate64, (int descriptor, off64_t size), (descriptor, size), -1, int, off64_t)
ON_DESCRIPTOR(int, fchmod, (int descriptor, mode_t mode), (descriptor, mode), -1, int, mode_t)
ON_DESCRIPTOR(int, flock, (int descriptor, int kind), (descriptor, kind), -1, int, int)
ON_DESCRIPTOR(int, fstat, (int descriptor, struct stat *to), (descriptor, to), -1, int, struct stat *)
ON_DESCRIPTOR(int, fstat64, (int descriptor, struct stat64 *to), (descriptor, to), -1, int, struct stat64 *)

void *mmap(void *at, size_t size, int protection, int flags, int descriptor, off_t offset) {
    REAL(void *, "mmap", void *, size_t, int, int, int, off_t)
    if (!(flags & MAP_ANONYMOUS) && is_watched(descriptor) && fails("mmap")) return MAP_FAILED;
    return real(at, size, protection, flags, descriptor, offset);
}

void *mmap64(void *at, size_t size, int protection, int flags, int descriptor, off64_t offset) {
    REAL(void *, "mmap64", void *, size_t, int, int, int, off64_t)
    if (!(flags & MAP_ANONYMOUS) && is_watched(descriptor) && fails("mmap64")) return MAP_FAILED;
    return real(at, size, protection, flags, descriptor, offset);
}

#define ON_PATH(name, parameters, arguments, folder, ...)               \
    int name parameters {                                               \
        REAL(int, #name, __VA_ARGS__)                                   \
        if (is_below(folder, path) && fails(#name)) return -1;          \
        return real arguments;                                          \
    }
ON_PATH(unlink, (const char *path), (path), AT_FDCWD, const char *)
ON_PATH(unlinkat, (int folder, const char *path, int flags), (folder, path, flags), folder, int, const char *, int)
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, const char *, mode_t)
ON_PATH(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), folder, int, const char *, mode_t)
ON_PATH(access, (const char *path, int mode), (path, mode), AT_FDCWD, const char *, int)
ON_PATH(rename, (const char *path, const char *to), (path, to), AT_FDCWD, const char *, const char *)
ON_PATH(chmod, (const char *path, mode_t mode), (path, mode), AT_FDCWD, const char *, mode_t)
ON_PATH(stat, (const char *path, struct stat *to), (path, to), AT_FDCWD, const char *, struct stat *)
ON_PATH(stat64, (const char *path, struct stat64 *to), (path, to), AT_FDCWD, const char *, struct stat64 *)
ON_PATH(lstat, (const char *path, struct stat *to), (path, to), AT_FDCWD, const char *, struct stat *)
ON_PATH(lstat64, (const char *path, struct stat64 *to), (path, to), AT_FDCWD, const char *, struct stat64 *)
ON_PATH(fstatat, (int folder, const char *path, struct stat *to, int flags), (folder, path, to, flags), folder, int,
        const char *, struct stat *, int)
ON_PATH(fstatat64, (int folder, const char *path, struct stat64 *to, int flags), (folder, path, to, flags), folder, int,
        const char *, struct stat64 *, int)
