// SPDX-License-Identifier: Apache-2.0
// Emulates a cluster of thread blocks on one CPU thread: fibers, barriers, warps, and detection of errors.
//
// Every CUDA thread is a fiber. It runs until it waits: at a barrier, at an instruction that its
// whole warp executes together, or for an mbarrier. The next warp to run is chosen at random from a
// seed, and a warp may be delayed, so that a missing barrier results in a wrong value.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"

namespace dtq::sim {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

struct Block;
struct Warp;

// An asynchronous copy of one thread into shared memory: `valid` bytes, then zeros up to 16.
struct Copy {
  unsigned char* to;
  const void* from;
  unsigned valid, size;
};

// A wgmma as issued; the registers are read when it runs, at the latest at the wait.
struct Wgmma {
  int32_t* sums;
  const uint32_t* a;  // null: from shared memory
  uint64_t a_desc, b_desc;
  int columns;
  bool add;  // to the sums; else overwrites them
};

// A bulk store as issued: shared memory is read at any time before the thread has waited for it, perhaps not
// earlier, and global memory is written at any time after that.
struct BulkStore {
  std::function<void()> read;
  bool has_read = false;
};

struct Thread {
  Context context;
  bool done = false, waiting = false, polling = false;
  unsigned index = 0;  // in its block
  Warp* warp = nullptr;
  Block* block = nullptr;
  std::vector<Copy> open;  // cp.async since the last commit
  std::deque<std::vector<Copy>> groups;
  std::vector<Wgmma> wgmma_open;
  std::deque<std::vector<Wgmma>> wgmma_groups;
  bool wgmma_fenced = false;
  std::vector<std::shared_ptr<BulkStore>> stores_open;  // since the last commit
  std::deque<std::vector<std::shared_ptr<BulkStore>>> store_groups;
  bool has_waited = false;  // for the previous kernel
  std::vector<unsigned> dirty;  // 16-byte chunks that it wrote since its last proxy fence
  unsigned accesses = 0;        // to shared memory since its warp last synchronized
};

struct Lane {
  uint32_t in[16];
  uint32_t out[4];
  const void* address;
  int number;
  Wgmma wgmma;
};

// One access to shared memory by the lanes of a warp, to count bank conflicts.
struct Access {
  uintptr_t address[32];
  unsigned lanes = 0, bytes = 0;
  bool uniform = true;
};

struct Warp {
  Lane lane[32];
  unsigned size = 32, arrived = 0;
  uint64_t syncs = 0;
  const char* what = "";
  std::vector<Access> accesses;
  unsigned at_barrier = 0;  // lanes that have reached a bar.sync
};

struct Barrier {
  unsigned arrived = 0;
  uint64_t phase = 0;
};

// Counts arrivals and bytes; a phase is complete when none are pending.
struct Mbarrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  bool visible = false;  // to the asynchronous proxy
};

struct Stats {
  uint64_t mma = 0, wgmma = 0, ldmatrix = 0, copies = 0, bulk_copies = 0, switches = 0;
  uint64_t shared = 0;      // shared-memory accesses by whole warps
  uint64_t wavefronts = 0;  // of these accesses
  uint64_t ideal = 0;       // wavefronts without bank conflicts

  Stats& operator+=(const Stats& other) {
    auto* sum = reinterpret_cast<uint64_t*>(this);
    auto* add = reinterpret_cast<const uint64_t*>(&other);
    for (size_t i = 0; i < sizeof(Stats) / 8; i++) sum[i] += add[i];
    return *this;
  }

  // Wavefronts / ideal; 1 without bank conflicts.
  double conflicts() const { return ideal ? double(wavefronts) / double(ideal) : 1; }
};

struct Cluster;

struct Block {
  Dim index, grid;
  unsigned rank = 0, alive = 0;
  unsigned asleep = 0;  // rounds for which all its warps are delayed
  size_t bytes = 0;
  unsigned char* shared = nullptr;
  std::vector<unsigned> dirty;  // per 16-byte chunk: 1 + the thread that wrote it, or 0
  std::vector<unsigned char> read_by_stores;  // per 16-byte chunk: how many bulk stores have yet to read it
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<unsigned, Barrier> barriers;
  std::map<unsigned, Mbarrier> mbarriers;  // by offset in shared memory
  Cluster* cluster = nullptr;

  ~Block() { std::free(shared); }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::function<void()>> pending;  // bulk copies in flight
  unsigned loads = 0, unread = 0;  // of bulk copies: not complete; stores that have yet to read shared memory
  std::vector<std::function<void()>> writes;   // to global memory, of bulk stores that have read theirs
  bool dependent = false;                      // launched so
  Barrier barrier;
  std::function<void()> body;
  uint64_t random = 1;
  Stats stats;
  std::string error;
};

inline thread_local Thread* self = nullptr;
inline thread_local Context scheduler;

inline Block& block() { return *self->block; }
inline Cluster& cluster() { return *self->block->cluster; }
inline Stats& stats() { return cluster().stats; }

inline uint64_t draw(Cluster& c) {  // xorshift64
  c.random ^= c.random << 13;
  c.random ^= c.random >> 7;
  c.random ^= c.random << 17;
  return c.random >> 11;
}

inline bool coin() { return draw(cluster()) & 1; }

inline void yield() {
  Thread* me = self;
  stats().switches++;
  switch_to(me->context, scheduler, me->done);
}

// Aborts the launch with this message.
inline void fail(const std::string& message) {
  Block& b = block();
  if (cluster().error.empty())
    cluster().error = message + " (block " + std::to_string(b.index.x) + "," +
                      std::to_string(b.index.y) + "," + std::to_string(b.index.z) + " thread " +
                      std::to_string(self->index) + ")";
  self->done = true;
  b.alive--;
  yield();
}

inline void wait_until_woken() {
  self->waiting = true;
  yield();
}

// ---------------------------------------------------------------------------- barriers

inline void wait_at(Barrier& barrier, unsigned threads, const std::function<void()>& wake) {
  const uint64_t phase = barrier.phase;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    barrier.phase++;
    wake();
    return;
  }
  while (barrier.phase == phase) wait_until_woken();
}

// bar.sync: `threads` threads of the block at barrier `id`.
inline void sync(unsigned id, unsigned threads) {
  Block& b = block();
  if (threads % 32 && threads != b.threads.size()) fail("bar.sync: not a number of whole warps");
  self->accesses = 0;
  Warp& w = *self->warp;
  if (++w.at_barrier == w.size) w.at_barrier = 0, w.accesses.clear();  // of the lanes before, too
  wait_at(b.barriers[id], threads, [&] {
    for (auto& t : b.threads) t.waiting = false;
  });
}

inline void sync_cluster() {
  Cluster& c = cluster();
  unsigned threads = 0;
  for (auto& b : c.blocks) threads += unsigned(b->threads.size());
  wait_at(c.barrier, threads, [&] {
    for (auto& b : c.blocks)
      for (auto& t : b->threads) t.waiting = false;
  });
}

// An instruction that a whole warp executes together: `fill` for each lane, then `run` once.
template <class Fill, class Run>
inline Lane& warp_sync(const char* what, Fill fill, Run run) {
  Thread* me = self;
  Warp& w = *me->warp;
  Lane& lane = w.lane[me->index % 32];
  fill(lane);
  if (w.arrived == 0) w.what = what;
  else if (std::strcmp(w.what, what))
    fail(std::string("divergent warp: ") + w.what + " and " + what);
  const uint64_t syncs = w.syncs;
  if (++w.arrived == w.size) {
    run(w);
    w.arrived = 0;
    w.syncs++;
    w.accesses.clear();
    for (auto& t : block().threads)
      if (t.warp == &w) t.waiting = false, t.accesses = 0;
  } else {
    while (w.syncs == syncs) wait_until_woken();
  }
  return lane;
}

// ---------------------------------------------------------------------------- bank conflicts

// The wavefronts of an access: 32 banks of 4 bytes; 16-byte accesses are done in groups of 8 lanes,
// 8-byte ones in groups of 16. Lanes that access the same word share it.
inline void count_wavefronts(const uintptr_t* address, unsigned lanes, unsigned bytes, Stats& s) {
  const unsigned at_once = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
  s.shared++;
  for (unsigned first = 0; first < lanes; first += at_once) {
    std::vector<uintptr_t> words;
    for (unsigned i = first; i < std::min(lanes, first + at_once); i++)
      for (unsigned b = 0; b < bytes; b += 4) words.push_back((address[i] + b) / 4);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    unsigned bank[32] = {}, most = 0;
    for (auto w : words) most = std::max(most, ++bank[w % 32]);
    s.wavefronts += most;
    s.ideal += (words.size() + 31) / 32;
  }
}

// Accesses of the lanes are matched by their count since the warp last synchronized. If lanes diverge
// in between, their sizes differ and nothing is counted.
inline void note_access(const void* p, unsigned bytes) {
  Warp& w = *self->warp;
  const unsigned number = self->accesses++;
  if (number >= 4096) return;
  if (w.accesses.size() <= number) w.accesses.resize(number + 1);
  Access& a = w.accesses[number];
  if (a.lanes == 0) a.bytes = bytes;
  a.uniform = a.uniform && a.bytes == bytes;
  a.address[self->index % 32] = reinterpret_cast<uintptr_t>(p);  // groups are of neighbouring lanes
  a.lanes++;
  if (a.lanes == w.size && a.uniform) count_wavefronts(a.address, a.lanes, bytes, stats());
}

// ---------------------------------------------------------------------------- running

inline void entry() {
  arrived(self->context, scheduler);
  cluster().body();
  if (!self->open.empty() || !self->wgmma_open.empty() || !self->wgmma_groups.empty())
    fail("thread ended with uncommitted copies or wgmma in flight");
  if (!self->stores_open.empty()) fail("thread ended with uncommitted bulk stores");
  self->done = true;
  block().alive--;
  yield();
  std::abort();
}

inline std::unique_ptr<Block> new_block(Cluster& c, Dim grid, Dim index, unsigned threads,
                                        size_t shared) {
  auto made = std::make_unique<Block>();
  Block& b = *made;
  b.grid = grid, b.index = index, b.rank = unsigned(c.blocks.size()), b.cluster = &c;
  b.bytes = shared, b.alive = threads;
  // exactly the requested size, so that address sanitizer detects accesses past the end
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, shared ? shared : 1)) std::abort();
  b.shared = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < shared; i++) b.shared[i] = (unsigned char)draw(c);  // random, not zeros
  b.dirty.assign(shared / 16 + 1, 0);
  b.read_by_stores.assign(shared / 16 + 1, 0);
  b.threads.resize(threads);
  b.warps.resize((threads + 31) / 32);
  for (unsigned i = 0; i < threads; i++) {
    Thread& t = b.threads[i];
    t.index = i, t.block = &b, t.warp = &b.warps[i / 32];
    prepare(t.context, stack_of(size_t(b.rank) * 1024 + i), entry);
  }
  for (unsigned i = 0; i < b.warps.size(); i++) b.warps[i].size = std::min(32u, threads - i * 32);
  return made;
}

inline void resume(Thread& t) {
  self = &t;
  switch_to(scheduler, t.context, false);
  self = nullptr;
}

inline void complete_one(Cluster& c) {
  const size_t i = draw(c) % c.pending.size();
  auto copy = std::move(c.pending[i]);
  c.pending.erase(c.pending.begin() + long(i));
  copy();
}

// Runs all blocks of the cluster until every thread is done or one has failed.
inline void run(Cluster& c) {
  struct Runnable {
    Block* block;
    unsigned warp;
    unsigned asleep;  // rounds for which it is delayed
  };
  std::vector<Runnable> warps;
  unsigned alive = 0;
  // blocks of a cluster do not start at the same time
  if (c.blocks.size() > 1) c.blocks[draw(c) % c.blocks.size()]->asleep = unsigned(draw(c) % 32);
  for (auto& b : c.blocks)
    for (unsigned w = 0; w < b->warps.size(); w++) warps.push_back({b.get(), w, 0});
  for (unsigned idle = 0; c.error.empty();) {
    alive = 0;
    for (auto& b : c.blocks) alive += b->alive;
    if (!alive) break;
    for (size_t i = warps.size(); i > 1; i--) std::swap(warps[i - 1], warps[draw(c) % i]);
    bool moved = false;
    if (c.blocks.size() > 1 && draw(c) % 64 == 0)
      c.blocks[draw(c) % c.blocks.size()]->asleep = unsigned(draw(c) % 32);
    // long enough for another warp to pass several reductions
    if (draw(c) % 16 == 0) warps[draw(c) % warps.size()].asleep = unsigned(draw(c) % 32);
    for (Runnable& next : warps) {
      if (draw(c) % 4 == 0) continue;  // this warp is delayed
      if (next.asleep || next.block->asleep) {
        next.asleep -= next.asleep > 0;
        moved = true;
        continue;
      }
      if (!c.pending.empty() && draw(c) % 8 == 0) complete_one(c), moved = true;
      Block& b = *next.block;
      const size_t first = next.warp * 32, last = std::min(first + 32, b.threads.size());
      for (size_t i = first; i < last && c.error.empty(); i++) {
        Thread& t = b.threads[i];
        if (t.done || t.waiting) continue;
        resume(t);
        moved = moved || !t.polling;
      }
      if (!c.error.empty()) return;
    }
    for (auto& b : c.blocks) b->asleep -= b->asleep > 0;
    idle = moved ? 0 : idle + 1;
    if (idle > 64 && !c.pending.empty()) complete_one(c), idle = 0;
    if (idle > 64) c.error = "deadlock: all threads wait, and no copy is pending";
  }
  if (c.error.empty() && c.unread) c.error = "block ended before a bulk store had read shared memory";
  if (c.error.empty() && c.loads) c.error = "block ended with bulk copies in flight";
  for (auto& write : c.writes) write();
}

struct Outcome {
  Stats stats;
  std::string error;
};

struct Shape {
  Dim grid;
  unsigned threads = 32;
  size_t shared = 0;
  unsigned cluster = 1;  // blocks along x
  bool dependent = false;  // programmatic dependent launch
};

// Every block of the grid, cluster by cluster.
inline Outcome launch(const Shape& s, uint64_t seed, const std::function<void()>& body) {
  Outcome out;
  if (!s.grid.x || !s.grid.y || !s.grid.z) out.error = "empty grid";
  if (s.grid.y > 65535 || s.grid.z > 65535) out.error = "grid.y and grid.z end at 65535";
  if (!s.threads || s.threads > 1024) out.error = "a block has 1 to 1024 threads";
  if (s.grid.x % s.cluster) out.error = "grid is not a number of whole clusters";
  for (unsigned z = 0; z < s.grid.z && out.error.empty(); z++)
    for (unsigned y = 0; y < s.grid.y && out.error.empty(); y++)
      for (unsigned x = 0; x < s.grid.x && out.error.empty(); x += s.cluster) {
        Cluster c;
        c.body = body;
        c.dependent = s.dependent;
        c.random = (seed + 1) * 0x9E3779B97F4A7C15ull + x * 7919u + y * 104729u + z * 1299709u;
        c.random |= 1;
        for (unsigned i = 0; i < s.cluster; i++)
          c.blocks.push_back(new_block(c, s.grid, {x + i, y, z}, s.threads, s.shared));
        run(c);
        out.error = c.error;
        out.stats += c.stats;
      }
  return out;
}

}  // namespace dtq::sim
