// Takes the place of the toolkit's header of this name: blocks, clusters and grids as groups.
#pragma once
#include "clusters.h"
#include "collectives.h"

namespace cooperative_groups {

using cuda_emulator::Site;

class thread_block {
 public:
  struct arrival_token {};

  static void sync(Site site = Site::current()) { __syncthreads(site); }
  arrival_token barrier_arrive() const { return {}; }
  void barrier_wait(arrival_token&&, Site site = Site::current()) const { __syncthreads(site); }

  static unsigned thread_rank() { return cuda_emulator::current().linear; }
  static unsigned num_threads() { return blockDim.x * blockDim.y * blockDim.z; }
  static unsigned size() { return num_threads(); }
  static dim3 group_index() { return cuda_emulator::dim3_of(blockIdx); }
  static dim3 thread_index() { return cuda_emulator::dim3_of(threadIdx); }
  static dim3 dim_threads() { return blockDim; }
  static dim3 group_dim() { return blockDim; }
};

class grid_group {
 public:
  using arrival_token = unsigned;

  bool is_valid() const { return cuda_emulator::current().block->grid().cooperative; }
  void sync(Site site = Site::current()) const { cuda_emulator::grid_sync(site); }
  arrival_token barrier_arrive(Site site = Site::current()) const {
    return static_cast<unsigned>(cuda_emulator::grid_arrive(site));
  }
  void barrier_wait(arrival_token&& token, Site site = Site::current()) const {
    cuda_emulator::grid_wait(token, site);
  }

  static unsigned long long block_rank() { return cuda_emulator::current().block->linear(); }
  static unsigned long long num_blocks() {
    return cuda_emulator::current().block->grid().block_count();
  }
  static unsigned long long thread_rank() {
    return block_rank() * thread_block::num_threads() + thread_block::thread_rank();
  }
  static unsigned long long num_threads() { return num_blocks() * thread_block::num_threads(); }
  static unsigned long long size() { return num_threads(); }
  static dim3 dim_blocks() { return gridDim; }
  static dim3 group_dim() { return gridDim; }
  static dim3 block_index() { return cuda_emulator::dim3_of(blockIdx); }
  static dim3 dim_clusters() { return __clusterGridDimInClusters(); }
  static dim3 cluster_index() { return __clusterIdx(); }
  static unsigned long long num_clusters() { return num_blocks() / __clusterSizeInBlocks(); }
  static unsigned long long cluster_rank() {
    const dim3 i = __clusterIdx(), d = __clusterGridDimInClusters();
    return (static_cast<unsigned long long>(i.z) * d.y + i.y) * d.x + i.x;
  }
};

class cluster_group {
 public:
  struct arrival_token {};

  static void sync(Site site = Site::current()) { cuda_emulator::cluster_sync(site); }
  static arrival_token barrier_arrive(Site site = Site::current()) {
    __cluster_barrier_arrive(site);
    return {};
  }
  static void barrier_wait(Site site = Site::current()) { __cluster_barrier_wait(site); }
  static void barrier_wait(arrival_token&&, Site site = Site::current()) {
    __cluster_barrier_wait(site);
  }

  template <class T>
  static T* map_shared_rank(T* address, int rank, Site site = Site::current()) {
    return static_cast<T*>(__cluster_map_shared_rank(address, static_cast<unsigned>(rank), site));
  }
  static unsigned query_shared_rank(const void* address, Site site = Site::current()) {
    return __cluster_query_shared_rank(address, site);
  }

  static dim3 block_index() { return __clusterRelativeBlockIdx(); }
  static unsigned block_rank() { return __clusterRelativeBlockRank(); }
  static dim3 dim_blocks() { return __clusterDim(); }
  static unsigned num_blocks() { return __clusterSizeInBlocks(); }
  static unsigned thread_rank() {
    return block_rank() * thread_block::num_threads() + thread_block::thread_rank();
  }
  static unsigned num_threads() { return num_blocks() * thread_block::num_threads(); }
  static unsigned size() { return num_threads(); }
};

inline thread_block this_thread_block() { return {}; }
inline grid_group this_grid() { return {}; }
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
