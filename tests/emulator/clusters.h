// What compute_90 adds for clusters, in CUDA's spelling (crt/sm_90_rt.h there).
#pragma once
#include "atomics.h"
#include "scheduler.h"

namespace cuda_emulator {

inline dim3 dim3_of(uint3 i) { return dim3(i.x, i.y, i.z); }

}  // namespace cuda_emulator

inline unsigned __clusterDimIsSpecified() {
  return cuda_emulator::current().block->grid().cluster_blocks() > 1;
}
inline dim3 __clusterDim() { return cuda_emulator::current().block->grid().cluster; }
inline dim3 __clusterIdx() {
  return cuda_emulator::dim3_of(cuda_emulator::current().block->cluster().index);
}
inline dim3 __clusterGridDimInClusters() {
  const dim3 d = __clusterDim();
  return dim3(gridDim.x / d.x, gridDim.y / d.y, gridDim.z / d.z);
}
inline dim3 __clusterRelativeBlockIdx() {
  const dim3 d = __clusterDim();
  return dim3(blockIdx.x % d.x, blockIdx.y % d.y, blockIdx.z % d.z);
}
inline unsigned __clusterRelativeBlockRank() { return cuda_emulator::current().block->rank(); }
inline unsigned __clusterSizeInBlocks() {
  return cuda_emulator::current().block->grid().cluster_blocks();
}
inline void __cluster_barrier_arrive(Site site = Site::current()) {
  cuda_emulator::cluster_arrive(false, site);
}
inline void __cluster_barrier_arrive_relaxed(Site site = Site::current()) {
  cuda_emulator::cluster_arrive(true, site);
}
inline void __cluster_barrier_wait(Site site = Site::current()) {
  cuda_emulator::cluster_wait(site);
}
inline void __threadfence_cluster(Site site = Site::current()) {
  cuda_emulator::fence(cuda_emulator::Scope::cluster, site);
}
inline void* __cluster_map_shared_rank(const void* address, unsigned rank,
                                       Site site = Site::current()) {
  return cuda_emulator::map_shared(address, rank, site);
}
inline unsigned __cluster_query_shared_rank(const void* address, Site site = Site::current()) {
  return cuda_emulator::shared_rank(address, site);
}
