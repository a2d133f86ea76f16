/* Fails, tears or cuts what a process does to the files below one folder, by a plan. Loaded with LD_PRELOAD.
 *
 * FAULT_ROOT   the folder; calls elsewhere are not counted
 * FAULT_PLAN   comma-separated: k17 = SIGKILL before the 17th counted call, a17 = after it, t17 = power cut in the middle
 *              of it, f17=5 = it fails with errno 5 (a write that fails has written its first half)
 * FAULT_LOG    gets a line per fault that happened
 *
 * Counted are the calls that change files: open with O_CREAT, write, pwrite, fsync, fdatasync, rename, unlink, rmdir,
 * mkdir, symlink, ftruncate, posix_fallocate. A power cut also spoils half of what was written and never synced.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_FAULTS 64
#define MAX_RANGES 4096
#define PATH_BYTES 512

struct fault { char kind; long number; int error; };
struct range { char path[PATH_BYTES]; off_t offset; size_t size; };

static struct fault faults[MAX_FAULTS];
static int num_faults;
static struct range ranges[MAX_RANGES];
static int num_ranges;
static long num_calls;
static char root[PATH_BYTES];
static char log_path[PATH_BYTES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void read_plan(void) {
    const char *folder = getenv("FAULT_ROOT"), *plan = getenv("FAULT_PLAN"), *log = getenv("FAULT_LOG");
    if (!folder || !plan || !log) return;
    snprintf(root, sizeof root, "%s/", folder);
    snprintf(log_path, sizeof log_path, "%s", log);
    while (*plan && num_faults < MAX_FAULTS) {
        struct fault *f = &faults[num_faults];
        f->error = EIO;
        if (sscanf(plan, "%c%ld=%d", &f->kind, &f->number, &f->error) >= 2) num_faults++;
        plan += strcspn(plan, ",");
        if (*plan == ',') plan++;
    }
}

static void tell(const char *kind, const char *call, const char *path) {
    char line[PATH_BYTES + 64];
    int size = snprintf(line, sizeof line, "%s %s %s\n", kind, call, path);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (fd >= 0) {
        syscall(SYS_write, fd, line, (size_t)size);
        syscall(SYS_close, fd);
    }
}

static int is_inside(const char *path) { return root[0] && strncmp(path, root, strlen(root)) == 0; }

static int fd_path(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, PATH_BYTES - 1);
    if (size <= 0) return 0;
    path[size] = 0;
    return is_inside(path);
}

static int at_path(int folder, const char *name, char *path) {
    if (name[0] == '/' || folder == AT_FDCWD) {
        snprintf(path, PATH_BYTES, "%s", name);
        return is_inside(path);
    }
    char base[PATH_BYTES];
    fd_path(folder, base);
    snprintf(path, PATH_BYTES, "%.250s/%.250s", base, name);
    return is_inside(path);
}

static void spoil_unsynced(unsigned seed) {
    for (int i = 0; i < num_ranges; i++) {
        seed = seed * 1664525u + 1013904223u;
        if ((seed >> 16) & 1) continue;
        int fd = (int)syscall(SYS_openat, AT_FDCWD, ranges[i].path, O_RDWR);
        if (fd < 0) continue;
        struct stat now;
        int at_end = fstat(fd, &now) == 0 && ranges[i].offset + (off_t)ranges[i].size >= now.st_size;
        if (at_end && ((seed >> 17) & 1)) {
            syscall(SYS_ftruncate, fd, ranges[i].offset);
        } else {
            static const char zeros[4096];
            for (size_t done = 0; done < ranges[i].size; done += sizeof zeros) {
                size_t part = ranges[i].size - done < sizeof zeros ? ranges[i].size - done : sizeof zeros;
                syscall(SYS_pwrite64, fd, zeros, part, ranges[i].offset + (off_t)done);
            }
        }
        syscall(SYS_close, fd);
    }
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

static void written(const char *path, off_t offset, ssize_t size) {
    if (size <= 0 || num_ranges == MAX_RANGES) return;
    struct range *r = &ranges[num_ranges++];
    snprintf(r->path, PATH_BYTES, "%s", path);
    r->offset = offset;
    r->size = (size_t)size;
}

static void synced(const char *path) {
    int kept = 0;
    for (int i = 0; i < num_ranges; i++)
        if (strcmp(ranges[i].path, path) != 0) ranges[kept++] = ranges[i];
    num_ranges = kept;
}

static void moved(const char *from, const char *to) {
    size_t size = strlen(from);
    for (int i = 0; i < num_ranges; i++) {
        if (strncmp(ranges[i].path, from, size) != 0 || (ranges[i].path[size] != 0 && ranges[i].path[size] != '/')) continue;
        char rest[PATH_BYTES];
        snprintf(rest, sizeof rest, "%s", ranges[i].path + size);
        snprintf(ranges[i].path, PATH_BYTES, "%.250s%.250s", to, rest);
    }
}

/* Counts one call; kills here when the plan says so. Returns the fault that the caller has to carry out, or NULL. */
static struct fault *counted(const char *call, const char *path) {
    num_calls++;
    for (int i = 0; i < num_faults; i++) {
        if (faults[i].number != num_calls) continue;
        if (faults[i].kind == 'k') {
            tell("kill", call, path);
            die();
        }
        return &faults[i];
    }
    return NULL;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define BEGIN(call, inside)                                    \
    char path[PATH_BYTES];                                     \
    if (!(inside)) return FORWARD;                             \
    pthread_mutex_lock(&lock);                                 \
    struct fault *fault = counted(call, path);                 \
    if (fault && fault->kind == 't') {                         \
        tell("cut", call, path);                               \
        TEAR;                                                  \
        spoil_unsynced((unsigned)fault->number);               \
        die();                                                 \
    }                                                          \
    if (fault && fault->kind == 'f') {                         \
        tell("fail", call, path);                              \
        TEAR;                                                  \
        pthread_mutex_unlock(&lock);                           \
        errno = fault->error;                                  \
        return FAILED;                                         \
    }
#define END(call, result)                                      \
    int kept_errno = errno;                                    \
    if (fault && fault->kind == 'a') {                         \
        tell("kill", call, path);                              \
        die();                                                 \
    }                                                          \
    pthread_mutex_unlock(&lock);                               \
    errno = kept_errno;                                        \
    return result

#define FAILED -1
#define TEAR (void)0

#define FORWARD real(fd)
int fsync(int fd) {
    REAL(fsync);
    BEGIN("fsync", fd_path(fd, path));
    int result = real(fd);
    if (result == 0) synced(path);
    END("fsync", result);
}
int fdatasync(int fd) {
    REAL(fdatasync);
    BEGIN("fdatasync", fd_path(fd, path));
    int result = real(fd);
    if (result == 0) synced(path);
    END("fdatasync", result);
}
#undef FORWARD

static off_t end_or_here(int fd) {
    struct stat now;
    if ((fcntl(fd, F_GETFL) & O_APPEND) && fstat(fd, &now) == 0) return now.st_size;
    return lseek(fd, 0, SEEK_CUR);
}

#undef TEAR
#define TEAR written(path, end_or_here(fd), (ssize_t)(syscall(SYS_write, fd, data, size / 2)))
#define FORWARD real(fd, data, size)
ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (!root[0]) return real(fd, data, size);
    BEGIN("write", fd_path(fd, path));
    off_t offset = end_or_here(fd);
    ssize_t result = real(fd, data, size);
    written(path, offset, result);
    END("write", result);
}
#undef FORWARD
#undef TEAR
#define TEAR written(path, offset, (ssize_t)(syscall(SYS_pwrite64, fd, data, size / 2, offset)))
#define FORWARD real(fd, data, size, offset)
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    BEGIN("pwrite", fd_path(fd, path));
    ssize_t result = real(fd, data, size, offset);
    written(path, offset, result);
    END("pwrite", result);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }
#undef FORWARD
#undef TEAR
#define TEAR (void)0

#define FORWARD real(fd, size)
int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    BEGIN("ftruncate", fd_path(fd, path));
    int result = real(fd, size);
    END("ftruncate", result);
}
#undef FORWARD
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

#undef FAILED
#define FAILED fault->error
#define FORWARD real(fd, offset, size)
int posix_fallocate64(int fd, off64_t offset, off64_t size) {
    REAL(posix_fallocate64);
    BEGIN("posix_fallocate", fd_path(fd, path));
    int result = real(fd, offset, size);
    END("posix_fallocate", result);
}
#undef FORWARD
#undef FAILED
#define FAILED -1
int posix_fallocate(int fd, off_t offset, off_t size) { return posix_fallocate64(fd, offset, size); }

#define FORWARD real(from, to)
int rename(const char *from, const char *to) {
    REAL(rename);
    BEGIN("rename", at_path(AT_FDCWD, from, path));
    int result = real(from, to);
    if (result == 0) moved(from, to);
    END("rename", result);
}
int symlink(const char *from, const char *to) {
    REAL(symlink);
    BEGIN("symlink", at_path(AT_FDCWD, to, path));
    int result = real(from, to);
    END("symlink", result);
}
#undef FORWARD

#define FORWARD real(name)
int unlink(const char *name) {
    REAL(unlink);
    BEGIN("unlink", at_path(AT_FDCWD, name, path));
    int result = real(name);
    END("unlink", result);
}
int rmdir(const char *name) {
    REAL(rmdir);
    BEGIN("rmdir", at_path(AT_FDCWD, name, path));
    int result = real(name);
    END("rmdir", result);
}
#undef FORWARD

#define FORWARD real(folder, name, flags)
int unlinkat(int folder, const char *name, int flags) {
    REAL(unlinkat);
    BEGIN("unlink", at_path(folder, name, path));
    int result = real(folder, name, flags);
    END("unlink", result);
}
#undef FORWARD

#define FORWARD real(name, mode)
int mkdir(const char *name, mode_t mode) {
    REAL(mkdir);
    BEGIN("mkdir", at_path(AT_FDCWD, name, path));
    int result = real(name, mode);
    END("mkdir", result);
}
#undef FORWARD

#define FORWARD real(name, flags, mode)
int open64(const char *name, int flags, ...) {
    REAL(open64);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = (mode_t)va_arg(rest, int);
    va_end(rest);
    if (!(flags & O_CREAT)) return FORWARD;
    BEGIN("open", at_path(AT_FDCWD, name, path));
    int result = real(name, flags, mode);
    END("open", result);
}
int open(const char *name, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = (mode_t)va_arg(rest, int);
    va_end(rest);
    return open64(name, flags, mode);
}
