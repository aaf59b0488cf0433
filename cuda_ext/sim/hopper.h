// SPDX-License-Identifier: Apache-2.0
// Emulation of the features of sm_90: mbarriers, bulk copies of tensor tiles, clusters, wgmma.
#pragma once
#include "../types.h"
#include "instructions.h"

namespace dtq {

// Rows of bytes in global memory, and the box that one copy transfers.
struct alignas(64) TensorMap {
  const unsigned char* base;
  int64_t rows, row_bytes, pitch;
  int box_rows, box_bytes;  // the swizzle is as wide as the box
};

// Rows of `row_bytes` bytes without gaps, in boxes of box_rows x 64 or 128 bytes.
inline int encode_rows(TensorMap* map, const void* base, int64_t rows, int64_t row_bytes,
                       int box_rows, int box_bytes) {
  if (reinterpret_cast<uintptr_t>(base) % 16 || row_bytes % 16) return kUnsupported;
  *map = {static_cast<const unsigned char*>(base), rows, row_bytes, row_bytes, box_rows, box_bytes};
  return kOk;
}

// ---------------------------------------------------------------------------- mbarriers

namespace sim {

inline Mbarrier& mbarrier_at(Block& b, const void* p, const char* what) {
  check_aligned(p, 8, what);
  auto entry = b.mbarriers.find(offset_of(p, 8, what));
  if (entry == b.mbarriers.end()) fail(std::string(what) + ": mbarrier was never initialised");
  return entry->second;
}

inline void settle(Mbarrier& m) {
  if (m.pending || m.bytes) return;
  m.phase++;
  m.pending = m.count;
}

inline void arrive(Mbarrier& m, int64_t bytes) {
  if (m.pending == 0) fail("mbarrier: more arrivals than its count");
  m.bytes += bytes;
  m.pending--;
  settle(m);
}

}  // namespace sim

inline void mbarrier_init(uint64_t* bar, int count) {
  sim::check_aligned(bar, 8, "mbarrier.init");
  auto& m = sim::block().mbarriers[sim::offset_of(bar, 8, "mbarrier.init")];
  m = {count, count, 0, 0, false};
}

// After the inits, before asynchronous copies use them; a barrier for the other threads must follow.
inline void fence_mbarrier_init() {
  for (auto& [offset, m] : sim::block().mbarriers) m.visible = true;
}

inline void mbarrier_arrive(uint64_t* bar) {
  sim::arrive(sim::mbarrier_at(sim::block(), bar, "mbarrier.arrive"), 0);
}

inline void mbarrier_arrive_expect(uint64_t* bar, int bytes) {
  sim::arrive(sim::mbarrier_at(sim::block(), bar, "mbarrier.arrive"), bytes);
}

// The mbarrier at the same address in another block of the cluster.
inline void mbarrier_arrive_at(uint64_t* bar, int rank) {
  if (unsigned(rank) >= sim::cluster().blocks.size()) sim::fail("mbarrier.arrive: no such block");
  sim::Block& other = *sim::cluster().blocks[size_t(rank)];
  if (!other.alive) sim::fail("mbarrier.arrive: that block has ended");
  sim::arrive(sim::mbarrier_at(other, bar, "mbarrier.arrive"), 0);
}

// Waits until the phase of this parity is complete.
inline void mbarrier_wait(uint64_t* bar, int parity) {
  auto& m = sim::mbarrier_at(sim::block(), bar, "mbarrier.try_wait");
  while (int(m.phase & 1) == (parity & 1)) {
    sim::self->polling = true;
    sim::yield();
    sim::self->polling = false;
  }
}

inline void sync_cluster() { sim::sync_cluster(); }

template <int registers>
inline void more_registers() {}
template <int registers>
inline void fewer_registers() {}

// ---------------------------------------------------------------------------- proxies, bulk copies

inline void fence_proxy_async() {
  auto& dirty = sim::block().dirty;
  for (unsigned c : sim::self->dirty)
    if (dirty[c] == sim::self->index + 1) dirty[c] = 0;
  sim::self->dirty.clear();
}

namespace sim {

// 16-byte chunks are permuted by their address in shared memory: within 8 x 128 bytes, or 8 x 64.
inline unsigned swizzled(unsigned offset, int width = 128) {
  return offset ^ (offset >> 7 & (width == 128 ? 7 : 3)) << 4;
}

inline void complete_box(Block& b, const TensorMap& map, unsigned to, unsigned bar, int column,
                     int row) {
  Cluster& c = *b.cluster;
  c.loads--;
  if (!b.alive) c.error = "bulk copy into a block that has ended";
  for (int r = 0; r < map.box_rows; r++)
    for (int i = 0; i < map.box_bytes; i++) {
      const int64_t x = int64_t(column) + i, y = int64_t(row) + r;
      const bool inside = x >= 0 && x < map.row_bytes && y >= 0 && y < map.rows;
      const unsigned at = swizzled(to + unsigned(r * map.box_bytes + i), map.box_bytes);
      if (b.dirty[at / 16])
        c.error = "bulk copy over what the generic proxy wrote, without fence.proxy.async";
      if (b.read_by_stores[at / 16]) c.error = "bulk copy over what a bulk store has yet to read";
      b.shared[at] = inside ? map.base[y * map.pitch + x] : 0;
    }
  Mbarrier& m = b.mbarriers[bar];
  m.bytes -= int64_t(map.box_rows) * map.box_bytes;
  settle(m);
}

}  // namespace sim

// Copies the box at (column byte, row) into shared memory of the blocks in `mask` (0: only this
// one), swizzled; the mbarrier of each of those blocks counts its bytes. Elements outside the tensor
// become zeros.
inline void load_box(void* to, const TensorMap& map, uint64_t* bar, int column, int row,
                     unsigned mask = 0) {
  using namespace sim;
  const int bytes = map.box_rows * map.box_bytes;
  check_aligned(to, 1024, "bulk copy");
  const unsigned offset = offset_of(to, size_t(bytes), "bulk copy");
  if (map.box_bytes != 128 && map.box_bytes != 64) fail("bulk copy: a box is 64 or 128 bytes wide");
  if (map.box_rows > 256) fail("bulk copy: a box has at most 256 rows");
  check_dependency("bulk copy");
  if (!mbarrier_at(block(), bar, "bulk copy").visible)
    fail("bulk copy: mbarrier initialised without fence");
  const unsigned at = offset_of(bar, 8, "bulk copy");
  if (!mask) mask = 1u << block().rank;
  for (auto& b : cluster().blocks)
    if (mask >> b->rank & 1) {
      if (!b->mbarriers.count(at)) fail("bulk copy: a block has no mbarrier there");
      stats().bulk_copies++;
      cluster().loads++;
      Block* target = b.get();
      cluster().pending.push_back([=] { complete_box(*target, map, offset, at, column, row); });
    }
}

namespace sim {

// The box as it is in shared memory now, and later in global memory.
inline void read_box(BulkStore& store, Block& b, const TensorMap& map, unsigned from, int column, int row) {
  if (store.has_read) return;
  store.has_read = true;
  Cluster& c = *b.cluster;
  c.unread--;
  std::vector<unsigned char> box(size_t(map.box_rows) * map.box_bytes);
  for (unsigned i = 0; i < box.size(); i++) box[i] = b.shared[swizzled(from + i, map.box_bytes)];
  for (unsigned at = from / 16; at < (from + box.size()) / 16; at++) b.read_by_stores[at]--;
  c.writes.push_back([=] {
    for (int r = 0; r < map.box_rows; r++)
      for (int i = 0; i < map.box_bytes; i++) {
        const int64_t x = int64_t(column) + i, y = int64_t(row) + r;
        if (x >= 0 && x < map.row_bytes && y >= 0 && y < map.rows)
          const_cast<unsigned char*>(map.base)[y * map.pitch + x] = box[size_t(r) * map.box_bytes + i];
      }
  });
}

}  // namespace sim

// Copies a box of shared memory, swizzled, to (column byte, row) of the tensor.
inline void store_box(const TensorMap& map, const void* from, int column, int row) {
  using namespace sim;
  const size_t bytes = size_t(map.box_rows) * map.box_bytes;
  check_aligned(from, 1024, "bulk store");
  check_dependency("bulk store");
  const unsigned offset = offset_of(from, bytes, "bulk store");
  for (unsigned c = offset / 16; c < (offset + bytes) / 16; c++) {
    if (block().dirty[c])
      fail("bulk store of what the generic proxy wrote, without fence.proxy.async");
    block().read_by_stores[c]++;
  }
  stats().bulk_copies++;
  auto store = std::make_shared<BulkStore>();
  Block* b = &block();
  store->read = [=, s = store.get()] { read_box(*s, *b, map, offset, column, row); };
  self->stores_open.push_back(store);
  cluster().unread++;
  if (coin()) cluster().pending.push_back([store] { store->read(); });
}
inline void bulk_commit() {
  sim::self->store_groups.push_back(std::move(sim::self->stores_open));
  sim::self->stores_open.clear();
}
template <int rest>
inline void bulk_wait_read() {
  auto& groups = sim::self->store_groups;
  while (int(groups.size()) > rest) {
    for (auto& store : groups.front()) store->read();
    groups.pop_front();
  }
}

// ---------------------------------------------------------------------------- wgmma

// The wgmma descriptor of rows of 128 bytes in the 128-byte swizzle, 1024 bytes per 8 rows.
inline uint64_t swizzled_rows(const void* p) {
  const uint64_t at = sim::offset_of(p, 16, "wgmma operand");
  return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 | at >> 4;
}

namespace sim {

// 32 bytes of row `row` of the operand: two swizzled chunks.
inline void read_row(uint64_t desc, int row, int8_t (&out)[32]) {
  const unsigned start = unsigned(desc & 0x3FFF) << 4, step = unsigned(desc >> 32 & 0x3FFF) << 4;
  if (desc >> 62 != 1) fail("wgmma: not a descriptor of the 128-byte swizzle");
  for (unsigned k = 0; k < 32; k += 16) {
    const unsigned at = swizzled(start + unsigned(row) / 8 * step + unsigned(row) % 8 * 128 + k);
    if (at + 16 > block().bytes) fail("wgmma: operand outside shared memory");
    if (block().dirty[at / 16])
      fail("wgmma reads what the generic proxy wrote, without fence.proxy.async");
    std::memcpy(out + k, block().shared + at, 16);
  }
}

// 32 products. Address sanitizer need not check these rows: they are the emulator's, not the kernel's.
__attribute__((optimize("O3"), no_sanitize("address", "undefined"))) inline int32_t dot_32(
    const int8_t* a, const int8_t* b) {
  int32_t sum = 0;
  for (int k = 0; k < 32; k++) sum += int32_t(a[k]) * b[k];
  return sum;
}

// One warp's 16 rows of D (64 x columns) += A (64 x 32) B (32 x columns).
inline void multiply_wgmma(Warp& w) {
  const Wgmma& first = w.lane[0].wgmma;
  static thread_local int8_t a[16][32], b[256][32];
  stats().wgmma++;
  for (int i = 0; i < 32; i++)
    if (w.lane[i].wgmma.b_desc != first.b_desc || w.lane[i].wgmma.a_desc != first.a_desc)
      return fail("wgmma: descriptors differ between lanes");
  for (int n = 0; n < first.columns; n++) read_row(first.b_desc, n, b[n]);
  const unsigned slab = unsigned(self->index / 32) % 4 * 16;
  for (int r = 0; r < 16; r++)
    if (!first.a) read_row(first.a_desc, int(slab) + r, a[r]);
  if (first.a)
    for (int i = 0; i < 32; i++)
      for (int q = 0; q < 4; q++)
        std::memcpy(&a[i / 4 + q % 2 * 8][i % 4 * 4 + q / 2 * 16], &w.lane[i].wgmma.a[q], 4);
  for (int i = 0; i < 32; i++) {
    const Wgmma& op = w.lane[i].wgmma;
    for (int e = 0; e < op.columns / 2; e++) {
      const int8_t *row = a[i / 4 + e / 2 % 2 * 8], *column = b[e / 4 * 8 + i % 4 * 2 + e % 2];
      const int32_t sum = dot_32(row, column);
      op.sums[e] = int32_t((op.add ? uint32_t(op.sums[e]) : 0u) + uint32_t(sum));
    }
  }
}

inline void run_group(std::vector<Wgmma>& group) {
  for (auto& op : group)
    warp_sync("wgmma", [&](Lane& l) { l.wgmma = op; }, multiply_wgmma);
}

inline void issue(const Wgmma& op) {
  if (!self->wgmma_fenced) fail("wgmma without wgmma.fence");
  self->wgmma_open.push_back(op);
}

}  // namespace sim

inline void wgmma_fence() { sim::self->wgmma_fenced = true; }

// D (64 x columns) += A B of 32 int8: A from registers or shared memory, B from shared memory.
template <int columns>
inline void wgmma_s8(int32_t (&sums)[columns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  sim::issue({sums, a, 0, b, columns, add});
}
template <int columns>
inline void wgmma_s8(int32_t (&sums)[columns / 2], uint64_t a, uint64_t b, bool add) {
  sim::issue({sums, nullptr, a, b, columns, add});
}

inline void wgmma_commit() {
  auto& t = *sim::self;
  t.wgmma_groups.push_back(std::move(t.wgmma_open));
  t.wgmma_open.clear();
  t.wgmma_fenced = false;
  // random, but the same for the whole warp: from its number of synchronizations
  if (!((t.warp->syncs * 0x9E3779B97F4A7C15ull >> 40) & 1)) return;
  auto groups = std::move(t.wgmma_groups);
  t.wgmma_groups.clear();
  for (auto& group : groups) sim::run_group(group);
}

template <int rest>
inline void wgmma_wait() {
  auto& t = *sim::self;
  while (int(t.wgmma_groups.size()) > rest) {
    auto group = std::move(t.wgmma_groups.front());
    t.wgmma_groups.pop_front();
    sim::run_group(group);
  }
}

}  // namespace dtq
