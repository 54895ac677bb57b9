/* The yardstick for io/block: a plain io_uring loop, as short as it can be, that knows nothing of FLAP.
 *
 *   plain_uring [folder] [MiB of file] [KiB of request] [depth]
 *
 * One unnamed file, O_DIRECT, one thread, registered buffers (in huge pages) and file, sequential requests, `depth` in
 * flight. The file is written once before anything is timed, because reserved space behaves differently from written
 * space. Then it is written and read once each, and the rates are printed in GB/s (10^9 bytes). */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef struct plain_loop {
  struct io_uring ring;
  unsigned char *memory;
  uint64_t bytes, request_bytes;
  unsigned depth;
} plain_loop;

static void fail(const char *what, int error) {
  fprintf(stderr, "plain_uring: %s: %s\n", what, strerror(error));
  exit(1);
}

static double now_seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void queue_one(plain_loop *loop, int writing, uint64_t slot, uint64_t offset) {
  struct io_uring_sqe *sqe = io_uring_get_sqe(&loop->ring);
  unsigned char *buffer = loop->memory + slot * loop->request_bytes;
  if (writing)
    io_uring_prep_write_fixed(sqe, 0, buffer, (unsigned)loop->request_bytes, offset, 0);
  else
    io_uring_prep_read_fixed(sqe, 0, buffer, (unsigned)loop->request_bytes, offset, 0);
  sqe->flags |= IOSQE_FIXED_FILE;
  io_uring_sqe_set_data64(sqe, slot);
}

static double run_pass(plain_loop *loop, int writing) {
  uint64_t offset = 0, done = 0;
  double start = now_seconds();
  for (uint64_t slot = 0; slot < loop->depth && offset < loop->bytes; slot++, offset += loop->request_bytes)
    queue_one(loop, writing, slot, offset);
  while (done < loop->bytes) {
    int result = io_uring_submit_and_wait(&loop->ring, 1);
    if (result < 0 && result != -EINTR)
      fail("submit", -result);
    struct io_uring_cqe *cqe;
    while (io_uring_peek_cqe(&loop->ring, &cqe) == 0) {
      if (cqe->res != (int)loop->request_bytes)
        fail(writing ? "write" : "read", cqe->res < 0 ? -cqe->res : EIO);
      uint64_t slot = io_uring_cqe_get_data64(cqe);
      io_uring_cqe_seen(&loop->ring, cqe);
      done += loop->request_bytes;
      if (offset < loop->bytes) {
        queue_one(loop, writing, slot, offset);
        offset += loop->request_bytes;
      }
    }
  }
  return (double)loop->bytes / (now_seconds() - start);
}

/* Noise, since drives may compress, or skip zeros (an xorshift generator). */
static void fill(unsigned char *memory, uint64_t bytes) {
  uint64_t x = 88172645463325252ull;
  for (uint64_t i = 0; i < bytes; i += 8) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    memcpy(memory + i, &x, 8);
  }
}

static uint64_t argument(int argc, char **argv, int index, uint64_t otherwise) {
  uint64_t value = index < argc ? strtoull(argv[index], NULL, 10) : otherwise;
  if (value == 0 || value > 1u << 30)
    fail("usage: plain_uring [folder] [MiB of file] [KiB of request] [depth]", EINVAL);
  return value;
}

int main(int argc, char **argv) {
  const char *folder = argc > 1 ? argv[1] : ".";
  plain_loop loop = {.bytes = argument(argc, argv, 2, 1024) << 20,
                     .request_bytes = argument(argc, argv, 3, 1024) << 10,
                     .depth = (unsigned)argument(argc, argv, 4, 16)};
  if (loop.bytes % loop.request_bytes != 0 || loop.request_bytes % 4096 != 0 || loop.depth > 4096)
    fail("requests must be multiples of 4 KiB and divide the file", EINVAL);
  int fd = open(folder, O_TMPFILE | O_RDWR | O_DIRECT | O_CLOEXEC, 0600);
  if (fd < 0)
    fail(folder, errno);
  if (fallocate(fd, 0, 0, (off_t)loop.bytes) != 0)
    fail("fallocate", errno);
  const uint64_t huge_bytes = 2u << 20;
  uint64_t memory_bytes = (loop.depth * loop.request_bytes + huge_bytes - 1) / huge_bytes * huge_bytes;
  /* Huge pages where there are any: drives like few long segments better than many of 4 KiB. */
  loop.memory = mmap(NULL, memory_bytes + huge_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (loop.memory == MAP_FAILED)
    fail("memory", errno);
  loop.memory += (huge_bytes - (uintptr_t)loop.memory % huge_bytes) % huge_bytes;
  (void)madvise(loop.memory, memory_bytes, MADV_HUGEPAGE);
  fill(loop.memory, memory_bytes);
  int result = io_uring_queue_init(loop.depth, &loop.ring, 0);
  if (result != 0)
    fail("io_uring", -result);
  struct iovec part = {loop.memory, memory_bytes};
  if ((result = io_uring_register_buffers(&loop.ring, &part, 1)) != 0 ||
      (result = io_uring_register_files(&loop.ring, &fd, 1)) != 0)
    fail("register", -result);
  (void)run_pass(&loop, 1);
  double write_rate = run_pass(&loop, 1);
  double read_rate = run_pass(&loop, 0);
  printf("read %.3f GB/s\nwrite %.3f GB/s\n", read_rate * 1e-9, write_rate * 1e-9);
  io_uring_queue_exit(&loop.ring);
  return 0;
}
