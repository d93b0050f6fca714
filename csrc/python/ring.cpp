// Binds the ring: slots leased to Python, given back when the last view of one is gone.
//
// A Lease exports a buffer; torch.frombuffer keeps the Lease alive for as long as the storage it
// makes, so views, slices and NumPy arrays of a batch all hold its slot.
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <optional>
#include <unordered_map>
#include <vector>

#include "collate/ring.h"

namespace py = pybind11;

namespace batchops::collate {
namespace {

// Pages that Python functions lock and unlock: torch knows how, and is not linked here.
class LockedMemory final : public SlotMemory {
 public:
  LockedMemory(py::function lock, py::function unlock)
      : lock_(std::move(lock)), unlock_(std::move(unlock)) {}

  std::byte* allocate(size_t bytes) override {
    std::byte* const data = pages_.allocate(bytes);
    if (data == nullptr) return nullptr;
    try {
      if (lock_(reinterpret_cast<uintptr_t>(data), bytes).cast<bool>()) return data;
    } catch (...) {
      pages_.release(data, bytes);
      throw;
    }
    pages_.release(data, bytes);
    return nullptr;
  }

  void release(std::byte* data, size_t bytes) noexcept override {
    try {
      unlock_(reinterpret_cast<uintptr_t>(data), bytes);
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("batchops: unlocking a slot");
    }
    pages_.release(data, bytes);
  }

 private:
  PageMemory pages_;
  const py::function lock_;
  const py::function unlock_;
};

// What the leases share. Used with the GIL held; events are Python objects with a query().
struct SharedRing {
  SharedRing(std::unique_ptr<SlotMemory> memory, size_t capacity, bool checked)
      : ring(std::move(memory), capacity, checked) {}

  // Waits for the copies that are under way: the pages are about to go. Not in a process that was
  // forked meanwhile, whose device this is not.
  ~SharedRing() {
    if (pid != getpid()) return;
    for (auto& [slot, event] : flying) {
      try {
        event.attr("synchronize")();
      } catch (py::error_already_set& error) {
        error.discard_as_unraisable("batchops: waiting for a copy");
      }
    }
  }

  // Slots whose copy is over become free. query() may let another thread run: what it adds to
  // `flying` meanwhile is kept.
  void poll() {
    std::vector<std::pair<Ring::Slot*, py::object>> waiting;
    waiting.swap(flying);
    for (auto& [slot, event] : waiting) {
      if (event.attr("query")().cast<bool>()) {
        ring.landed(slot);
      } else {
        flying.emplace_back(slot, std::move(event));
      }
    }
  }

  Ring ring;
  std::vector<std::pair<Ring::Slot*, py::object>> flying;
  std::unordered_map<uintptr_t, class Lease*> leases;  // by address
  const pid_t pid = getpid();
};

class Lease {
 public:
  Lease(std::shared_ptr<SharedRing> shared, Ring::Slot* slot, size_t bytes)
      : shared_(std::move(shared)), slot_(slot), bytes_(bytes) {
    shared_->leases[address()] = this;
  }
  ~Lease() {
    shared_->leases.erase(address());
    if (event_.is_none()) {
      shared_->ring.release(slot_, false);
    } else {
      shared_->ring.release(slot_, true);
      shared_->flying.emplace_back(slot_, std::move(event_));
    }
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(Ring::data(slot_)); }
  void hold_until(py::object event) { event_ = std::move(event); }

  py::buffer_info buffer() const {
    return py::buffer_info(reinterpret_cast<uint8_t*>(Ring::data(slot_)),
                           static_cast<py::ssize_t>(bytes_));
  }

 private:
  const std::shared_ptr<SharedRing> shared_;
  Ring::Slot* const slot_;
  const size_t bytes_;
  py::object event_ = py::none();
};

class PyRing {
 public:
  PyRing(size_t capacity, bool checked, const py::object& lock, const py::object& unlock) {
    std::unique_ptr<SlotMemory> memory;
    if (lock.is_none()) {
      memory = std::make_unique<PageMemory>();
    } else {
      memory =
          std::make_unique<LockedMemory>(lock.cast<py::function>(), unlock.cast<py::function>());
    }
    shared_ = std::make_shared<SharedRing>(std::move(memory), capacity, checked);
  }

  std::unique_ptr<Lease> acquire(size_t bytes) {
    if (!shared_->flying.empty()) shared_->poll();
    Ring::Slot* const slot = shared_->ring.acquire(bytes);
    if (slot == nullptr) return nullptr;
    return std::make_unique<Lease>(shared_, slot, bytes);
  }

  bool hold(uintptr_t address, py::object event) {
    const auto found = shared_->leases.find(address);
    if (found == shared_->leases.end()) return false;
    found->second->hold_until(std::move(event));
    return true;
  }

  void trim() {
    shared_->poll();
    shared_->ring.trim();
  }

  py::dict stats() {
    shared_->poll();
    const RingStats stats = shared_->ring.stats();
    py::dict out;
    out["slots"] = stats.slots;
    out["leased"] = stats.leased;
    out["in_flight"] = stats.in_flight;
    out["bytes"] = stats.bytes;
    out["leased_bytes"] = stats.leased_bytes;
    out["capacity"] = shared_->ring.capacity();
    out["allocations"] = stats.allocations;
    out["reuses"] = stats.reuses;
    out["refusals"] = stats.refusals;
    return out;
  }

 private:
  std::shared_ptr<SharedRing> shared_;
};

}  // namespace
}  // namespace batchops::collate

void bind_ring(py::module_& m) {
  using namespace batchops::collate;

  py::class_<Lease>(m, "Lease", py::buffer_protocol(),
                    "A slot of a ring, for as long as this lives")
      .def_buffer(&Lease::buffer);

  py::class_<PyRing>(m, "Ring", "Memory that batches are written to, used again and again")
      .def(py::init<size_t, bool, const py::object&, const py::object&>(), py::arg("capacity"),
           py::arg("checked") = false, py::arg("lock") = py::none(), py::arg("unlock") = py::none(),
           "lock(address, bytes) -> bool and unlock(address, bytes) page-lock slots")
      .def("acquire", &PyRing::acquire, py::arg("bytes"),
           "A Lease, or None: capacity reached, or no memory")
      .def("hold", &PyRing::hold, py::arg("address"), py::arg("event"),
           "The slot that begins there is not used again before event.query() is true, however "
           "early its lease is dropped; False where none does")
      .def("trim", &PyRing::trim, "Gives the memory of free slots back")
      .def("stats", &PyRing::stats);
}
