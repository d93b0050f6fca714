// torch.classes.batchops.OptimizerTable: the tensors of one LAMB or LARS on one device, and a step
// over them as one call. Between steps it holds none of them, as torch's own optimizers hold none
// but in their groups and states: another reference would keep replaced states alive, hide cycles
// from Python's collector and forbid torch.utils.swap_tensors, which a weak one does too. It knows
// the addresses of the Python objects, looks up in every step whether they are still where the
// optimizer has its parameters and states, and then reads everything about them anew.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <iterator>
#include <unordered_set>
#include <utility>
#include <vector>

#include "kernels/info.h"
#include "kernels/lamb.h"
#include "kernels/lars.h"
#include "python/optimizer_objects.h"
#include "torch/common.h"

namespace batchops::binding {
namespace {

using at::Tensor;

// What tells the optimizers apart here.
struct Kind {
  const char* op;
  bool lamb;
  size_t numbers;  // of a group
  std::array<const char*, 2> states;
};
const Kind& kind_of(const std::string& name) {
  static const Kind lamb{"LAMB.step", true, 8, {"exp_avg", "exp_avg_sq"}};
  static const Kind lars{"LARS.step", false, 7, {"momentum_buffer", "second"}};
  TORCH_CHECK_VALUE(name == "LAMB" || name == "LARS", "OptimizerTable: expected LAMB or LARS, got ",
                    name);
  return name == "LAMB" ? lamb : lars;
}

// Element i of `a`'s memory is element i of `b`'s, given equal sizes and no gaps.
bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && a.strides()[d] != b.strides()[d]) return false;
  }
  return true;
}

bool kernel_dtype(const Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kHalf ||
         t.scalar_type() == at::kBFloat16;
}

// What of a parameter the kernels work on; states that it does not have are null.
struct Row {
  const Tensor *p = nullptr, *first = nullptr, *second = nullptr, *master = nullptr,
               *step = nullptr;
};

// Why the kernels cannot serve these tensors, apart from their device; empty if they can.
std::string unsupported(const Kind& kind, const Row& row) {
  const auto text = [](const auto&... parts) { return c10::str(parts...); };
  const Tensor& p = *row.p;
  if (p.layout() != at::kStrided || p.unsafeGetTensorImpl()->is_python_dispatch()) {
    return "expected a plain strided tensor";
  }
  if (!kernel_dtype(p)) {
    return text("expected float32, float16 or bfloat16, got ", p.scalar_type());
  }
  if (!p.is_non_overlapping_and_dense()) {
    return text("expected memory without gaps, got size ", p.sizes(), " with strides ",
                p.strides());
  }
  if (p.is_conj() || p.is_neg()) return "expected a tensor without a lazy conjugate or minus";
  const auto fits = [&](const Tensor* state, const char* name) -> std::string {
    if (state == nullptr) return "";
    if (state->scalar_type() != at::kFloat || state->layout() != at::kStrided ||
        state->unsafeGetTensorImpl()->is_python_dispatch()) {
      return text("expected ", name, " in float32, got ", state->scalar_type());
    }
    if (state->device() != p.device()) {
      return text("expected ", name, " on ", p.device(), ", got ", state->device());
    }
    if (state->sizes() != p.sizes() || !same_layout(*state, p)) {
      return text("expected ", name, " of size ", p.sizes(), " with the parameter's strides ",
                  p.strides(), ", got ", state->sizes(), " with ", state->strides());
    }
    return "";
  };
  std::string reason = fits(row.first, kind.states[0]);
  if (reason.empty()) reason = fits(row.second, kind.states[1]);
  return reason.empty() ? fits(row.master, "master") : reason;
}

// Why the kernels cannot run where the tensor is. Constant for the process, and not cheap to ask.
std::string unsupported_device(const Tensor& p) {
  if (!p.is_cpu() && !p.is_cuda()) {
    return c10::str("expected a CPU or CUDA tensor, got ", p.device());
  }
  if (p.is_cuda()) {
    const c10::DeviceGuard guard(p.device());
    if (const char* problem = cuda_problem(p.device().index())) return problem;
  }
  return "";
}

using State = std::optional<Tensor>;  // none where it is not there
using States = std::vector<State>;

class WithGil {
 public:
  WithGil() : state_(PyGILState_Ensure()) {}
  ~WithGil() { PyGILState_Release(state_); }
  WithGil(const WithGil&) = delete;
  WithGil& operator=(const WithGil&) = delete;

 private:
  const PyGILState_STATE state_;
};

// for_each_object(), whose mistakes are a TypeError of torch's.
template <class F>
bool for_each(PyObject* lists, PyObject* state, F&& f) {
  const auto refuse = [](const char* expected, PyObject* object) {
    TORCH_CHECK_TYPE(false, "expected ", expected, ", got ", Py_TYPE(object)->tp_name);
  };
  return for_each_object(lists, state, refuse, f);
}

class OptimizerTable : public torch::CustomClassHolder {
 public:
  // `lists` and `state` are the addresses of a Python list of the groups' parameters, and of the
  // optimizer's states. The vectors that follow are of addresses of tensors among them, 0 for those
  // that are not there. LARS: first the momentum buffers, none in groups without momentum;
  // `seconds` are none. `low_has_master`: a float16 or bfloat16 parameter is to have a master.
  OptimizerTable(const std::string& kind, int64_t lists, int64_t state,
                 const std::vector<int64_t>& params, const std::vector<int64_t>& firsts,
                 const std::vector<int64_t>& seconds, const std::vector<int64_t>& masters,
                 const std::vector<int64_t>& steps, std::vector<int64_t> low_has_master,
                 std::vector<int64_t> group_of, std::vector<int64_t> excluded,
                 std::vector<std::string> names)
      : kind_(kind_of(kind)),
        low_has_master_(std::move(low_has_master)),
        group_of_(std::move(group_of)),
        excluded_(std::move(excluded)),
        names_(std::move(names)) {
    const size_t n = params.size();
    for (size_t length :
         {firsts.size(), seconds.size(), masters.size(), steps.size(), low_has_master_.size(),
          group_of_.size(), excluded_.size(), names_.size()}) {
      TORCH_CHECK_VALUE(n > 0 && length == n,
                        "OptimizerTable: expected lists of one length, at least 1, got ", n,
                        " and ", length);
    }
    for (size_t i = 0; i < n; ++i) {
      TORCH_CHECK_VALUE(params[i] && steps[i], "OptimizerTable: expected parameters and counts");
      TORCH_CHECK_VALUE(!kind_.lamb || (firsts[i] && seconds[i]),
                        "OptimizerTable: LAMB needs both moments");
      objects_of_.push_back({object(params[i]), object(firsts[i]), object(seconds[i]),
                             object(masters[i]), object(steps[i])});
    }
    const WithGil gil;
    for_each(object(lists), object(state), [&](PyObject* object) {
      all_objects_.push_back(object);
      return true;
    });
    const std::unordered_set<PyObject*> looked_up(all_objects_.begin(), all_objects_.end());
    for (const Handles& x : objects_of_) {
      for (PyObject* object : {x.p, x.first, x.second, x.master, x.step}) {
        if (object == nullptr) continue;
        // Of any other nobody would know whether it is still there.
        TORCH_CHECK_VALUE(looked_up.count(object) != 0,
                          "OptimizerTable: expected tensors in `lists` and `state`");
        if (tensor_at(object) == nullptr) types_.push_back(Py_TYPE(object));
      }
    }
    device_ = tensor_at(objects_of_[0].p)->device();
    counts_home_ = tensor_at(objects_of_[0].step)->device();
    TORCH_CHECK_VALUE(counts_home_.is_cpu() || counts_home_ == device_,
                      "OptimizerTable: expected step counts on the CPU or on ", device_, ", got ",
                      counts_home_);
    group_count_ = static_cast<int32_t>(1 + *std::max_element(group_of_.begin(), group_of_.end()));
  }

  // Reads .grad of every parameter and checks what the step will touch. Whether these kernels can
  // serve them: at `lists` and `state` there may be other objects than before, or dtypes, devices
  // or layouts have changed. The objects are looked up under the GIL and then read without it, as
  // gradients are, and the step works on them without it: Python must not change the optimizer's
  // states meanwhile. Addresses of 0: who calls holds the objects that were looked up before.
  bool prepare(int64_t lists, int64_t state) {
    if (lists != 0 && !has_objects(lists, state)) return false;
    // Tensors that lie all over memory are waited for rather than computed with: by all threads.
    constexpr size_t kPart = 256;
    const size_t count = objects_of_.size();
    const size_t parts =
        std::min(static_cast<size_t>(at::get_num_threads()), std::max(count / kPart, size_t{1}));
    std::vector<Found> found(parts);
    const auto read_part = [&](size_t k, bool may_copy) {
      return read(count * k / parts, count * (k + 1) / parts, may_copy, found[k]);
    };
    bool whole = false;
    if (parts > 1 && !at::in_parallel_region()) {
      std::atomic<bool> complete{true};
      at::parallel_for(0, static_cast<int64_t>(parts), 1, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          try {
            if (!read_part(static_cast<size_t>(k), false)) complete = false;
          } catch (...) {
            complete = false;
          }
        }
      });
      whole = complete;
    }
    // One after the other it is the first one that is told of.
    for (size_t k = 0; k < parts && !whole; ++k) {
      found[k] = {};
      if (!read_part(k, true)) return false;
    }
    found_ = std::move(found[0]);
    for (size_t k = 1; k < parts; ++k) found_.append(std::move(found[k]));
    return true;
  }

  // Σ grad², a 0-dim float64 tensor on the device; of what prepare() has read.
  Tensor grad_sum_sq() {
    Tensor sum = at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(device_));
    if (found_.tensors.empty()) return sum;
    if (device_.is_cpu()) {
      raise_on(grad_sum_sq_cpu(found_.tensors.data(), static_cast<int64_t>(found_.tensors.size()),
                               sum.mutable_data_ptr<double>(), torch_threads()));
      return sum;
    }
    const c10::DeviceGuard guard(device_);
    upload();
    const auto count = static_cast<int64_t>(found_.tensors.size());
    const Tensor workspace =
        bytes_on_device(grad_sum_sq_workspace_bytes_cuda(found_.tensors.data(), count));
    raise_on(grad_sum_sq_cuda(found_.tensors.data(), count, table_.const_data_ptr(),
                              workspace.mutable_data_ptr(), sum.mutable_data_ptr<double>(),
                              device_.index(), current_stream(device_)));
    return sum;
  }

  // prepare(), and where that is true the step. `numbers` and `flags` hold the fields of LambGroup
  // or LarsGroup, each group's in their order, the flags as bits. max_grad_norm 0 is no clip;
  // grad_sum_sq counts gradients that other tables hold as well. What follows it is on the device
  // of a GPU, and none elsewhere: the loss scale in place of grad_scale and, with step counts
  // there, found_inf, and for each group two numbers in place of its own or none (DeviceNumbers,
  // device_rates); and how many of its multiprocessors the step leaves to other kernels.
  bool step(int64_t lists, int64_t state, const std::vector<double>& numbers,
            const std::vector<int64_t>& flags, double max_grad_norm, double clip_eps,
            double grad_scale, const State& grad_sum_sq, const State& device_grad_scale,
            const State& found_inf, const States& rates, int64_t sm_margin) {
    if (!prepare(lists, state)) return false;
    set_groups(numbers, flags);
    numbers_on_device(device_grad_scale, found_inf, rates);
    max_grad_norm_ = max_grad_norm;
    clip_eps_ = clip_eps;
    grad_scale_ = grad_scale;
    sm_margin_ = static_cast<int32_t>(std::min<int64_t>(sm_margin, 1 << 30));
    seen_.clear();
    if (found_.tensors.empty()) return true;

    stats_ = at::empty({static_cast<int64_t>(found_.tensors.size()), 4},
                       at::TensorOptions().dtype(at::kFloat).device(device_));
    auto* stats = reinterpret_cast<TensorStats*>(stats_.mutable_data_ptr<float>());
    if (device_.is_cpu()) {
      const double* sum = grad_sum_sq ? grad_sum_sq->const_data_ptr<double>() : nullptr;
      raise_on(kind_.lamb ? lamb_step_cpu(lamb(), sum, stats, torch_threads())
                          : lars_step_cpu(lars(), sum, stats, torch_threads()));
    } else {
      step_on_device(grad_sum_sq, stats);
    }
    for (size_t k = 0; k < found_.counts.size(); ++k)
      *found_.counts[k] = static_cast<float>(found_.tensors[k].step);
    seen_ = found_.active;
    // Autograd must notice that what it may have saved has changed.
    at::parallel_for(
        0, static_cast<int64_t>(found_.written.size()), 2048, [&](int64_t begin, int64_t end) {
          raise_versions(found_.written.data() + begin, static_cast<size_t>(end - begin));
        });
    found_.kept.clear();
    return true;
  }

  // Of the last step, whatever prepare() has read since: the indices of the tensors that had a
  // gradient, and for each ‖p‖, ‖g‖, ‖u‖ and ratio, on the device.
  std::tuple<std::vector<int64_t>, Tensor> stats() const {
    return {std::vector<int64_t>(seen_.begin(), seen_.end()),
            stats_.defined() ? stats_ : at::empty({0, 4}, at::TensorOptions().dtype(at::kFloat))};
  }

 private:
  // Of a parameter; null for what it does not have.
  struct Handles {
    PyObject *p, *first, *second, *master, *step;
  };
  static PyObject* object(int64_t address) { return reinterpret_cast<PyObject*>(address); }

  bool has_objects(int64_t lists, int64_t state) const {
    const WithGil gil;
    auto at = all_objects_.begin();
    const bool all = for_each(object(lists), object(state), [&](PyObject* object) {
      return at != all_objects_.end() && *at++ == object;
    });
    return all && at == all_objects_.end();
  }
  // At an address there may be another object than before, of any kind; null if it is no tensor of
  // the types there were.
  const Tensor* tensor_at(PyObject* object) const {
    for (PyTypeObject* type : types_) {
      if (Py_TYPE(object) == type) return &THPVariable_Unpack(object);
    }
    return nullptr;
  }

  void raise_on(const char* message) const {
    TORCH_CHECK(message == nullptr, kind_.op, ": ", message);
  }
  // An increment is atomic, and nothing overlaps with its wait for memory: so counters are read a
  // batch ahead, which overlaps.
  static void raise_versions(c10::TensorImpl* const* impls, size_t count) {
    constexpr size_t kBatch = 32;
    for (size_t begin = 0; begin < count; begin += kBatch) {
      const size_t end = std::min(begin + kBatch, count);
      for (size_t k = end; k < std::min(end + kBatch, count); ++k) ask_for(impls[k]);
      std::array<bool, kBatch> counted;
      for (size_t k = begin; k < end; ++k) {
        counted[k - begin] = !impls[k]->is_inference();
        if (counted[k - begin]) {
          [[maybe_unused]] volatile uint32_t seen = impls[k]->version_counter().current_version();
        }
      }
      for (size_t k = begin; k < end; ++k) {
        if (counted[k - begin]) impls[k]->bump_version();
      }
    }
  }

  // Tensors lie all over memory, and from a handle to its numbers there are several steps from
  // pointer to pointer: those of parameters further on are asked for ahead.
  static void ask_for(const c10::TensorImpl* impl) {
    const auto* bytes = reinterpret_cast<const char*>(impl);
    for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) {
      __builtin_prefetch(bytes + line);
    }
  }
  static void ask_for_storage(const c10::TensorImpl* impl) {
    if (impl->has_storage()) {
      __builtin_prefetch(impl->unsafe_storage().unsafeGetStorageImpl());
      __builtin_prefetch(
          reinterpret_cast<const char*>(impl->unsafe_storage().unsafeGetStorageImpl()) + 64);
    }
  }
  void ask_ahead(size_t i) const {
    const size_t count = objects_of_.size();
    const auto each = [&](size_t k, auto&& f) {
      if (k >= count) return;
      const Handles& x = objects_of_[k];
      for (PyObject* object : {x.p, x.step, x.first, x.second, x.master}) {
        if (object != nullptr) f(object);
      }
    };
    const auto with_impl = [&](auto&& f) {
      return [this, f](PyObject* object) {
        if (const Tensor* t = tensor_at(object)) f(t->unsafeGetTensorImpl());
      };
    };
    each(i + 15, [](const PyObject* object) { __builtin_prefetch(object); });
    each(i + 12, with_impl([](const c10::TensorImpl* impl) { ask_for(impl); }));
    each(i + 9, with_impl([](const c10::TensorImpl* impl) { ask_for_storage(impl); }));
    const auto parameter = [&](size_t k) {
      return k < count ? tensor_at(objects_of_[k].p) : nullptr;
    };
    if (const Tensor* p = parameter(i + 9)) {
      const auto* meta = reinterpret_cast<const char*>(p->unsafeGetTensorImpl()->autograd_meta());
      __builtin_prefetch(meta);
      __builtin_prefetch(meta + 64);
    }
    if (const Tensor* p = parameter(i + 6)) ask_for(p->grad().unsafeGetTensorImpl());
    if (const Tensor* p = parameter(i + 3)) ask_for_storage(p->grad().unsafeGetTensorImpl());
  }

  void check_grad(const Tensor& p, const Tensor& grad, const std::string& name) const {
    TORCH_CHECK(grad.layout() == at::kStrided, kind_.op, ": ", name,
                " has a sparse gradient; expected a dense one");
    TORCH_CHECK(!grad.is_complex(), kind_.op, ": ", name,
                " has a complex gradient; expected a real one");
    TORCH_CHECK(at::isFloatingType(grad.scalar_type()) && grad.sizes() == p.sizes() &&
                    grad.device() == p.device(),
                kind_.op, ": ", name, " expects a floating-point gradient of size ", p.sizes(),
                " on ", p.device(), ", got ", grad.scalar_type(), " of size ", grad.sizes(), " on ",
                grad.device());
    // A subclass that wraps other tensors, or storage that was given back: no memory to read.
    TORCH_CHECK(!grad.unsafeGetTensorImpl()->is_python_dispatch(), kind_.op, ": ", name,
                " expects a gradient that is a plain tensor; fused=False takes subclasses");
    TORCH_CHECK(
        grad._is_zerotensor() || grad.numel() == 0 ||
            grad.storage().nbytes() >=
                static_cast<size_t>(grad.storage_offset() + span(grad)) * grad.element_size(),
        kind_.op, ": ", name, " has a gradient whose storage is too small for its size ",
        grad.sizes());
  }

  // Elements from the first to the last, inclusive.
  static int64_t span(const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return last + 1;
  }

  // What a step has found of parameters with a gradient.
  struct Found {
    std::vector<OptimizerTensor> tensors;
    std::vector<size_t> active;  // their indices
    std::vector<float*> counts;  // their step counts, where those are on the CPU
    std::vector<Tensor> kept;    // copies of gradients, for the duration of a step
    std::vector<c10::TensorImpl*> written;

    void append(Found&& more) {
      const auto to = [](auto& all, auto& part) {
        all.insert(all.end(), std::make_move_iterator(part.begin()),
                   std::make_move_iterator(part.end()));
      };
      to(tensors, more.tensors);
      to(active, more.active);
      to(counts, more.counts);
      to(kept, more.kept);
      to(written, more.written);
    }
  };

  // Parameters [begin, end). False if one cannot be served, or has a gradient to copy where none
  // may be.
  bool read(size_t begin, size_t end, bool may_copy, Found& found) const {
    found.tensors.reserve(end - begin);
    found.active.reserve(end - begin);
    found.written.reserve(4 * (end - begin));
    if (counts_home_.is_cpu()) found.counts.reserve(end - begin);
    for (size_t i = begin; i < end; ++i) {
      ask_ahead(i);
      Row row;
      if (!row_of(objects_of_[i], row)) return false;
      const Tensor& p = *row.p;
      const Tensor& grad = p.grad();
      if (!grad.defined()) continue;
      // That the kernels run on the device, the owner has asked.
      if (p.device() != device_ || !unsupported(kind_, row).empty() ||
          (low_has_master_[i] != 0 && row.master == nullptr && p.scalar_type() != at::kFloat) ||
          row.step->device() != counts_home_ || row.step->scalar_type() != at::kFloat ||
          row.step->numel() != 1) {
        return false;
      }
      check_grad(p, grad, names_[i]);
      if (!add(i, row, grad, may_copy, found)) return false;
    }
    return true;
  }

  bool row_of(const Handles& x, Row& row) const {
    const auto get = [&](PyObject* object, const Tensor*& t) {
      t = object == nullptr ? nullptr : tensor_at(object);
      return object == nullptr || t != nullptr;
    };
    return get(x.p, row.p) && get(x.first, row.first) && get(x.second, row.second) &&
           get(x.master, row.master) && get(x.step, row.step);
  }

  bool add(size_t i, const Row& row, const Tensor& grad, bool may_copy, Found& found) const {
    const Tensor& p = *row.p;
    const Tensor* g = &grad;
    if (g->is_neg() || g->_is_zerotensor() || !kernel_dtype(*g) || !same_layout(*g, p)) {
      // Rare: a layout of its own, or a dtype no kernel takes. One copy in the parameter's layout.
      if (!may_copy) return false;
      const auto type = kernel_dtype(*g) ? g->scalar_type() : at::kFloat;
      found.kept.push_back(
          at::empty_strided(p.sizes(), p.strides(), g->options().dtype(type)).copy_(*g));
      g = &found.kept.back();
    }
    const auto data = [&](const Tensor* state) -> float* {
      if (state == nullptr) return nullptr;
      found.written.push_back(state->unsafeGetTensorImpl());
      return state->mutable_data_ptr<float>();
    };
    OptimizerTensor x;
    x.p = p.mutable_data_ptr();
    found.written.push_back(p.unsafeGetTensorImpl());
    x.g = g->const_data_ptr();
    x.m = data(row.first);
    x.v = data(row.second);
    x.master = data(row.master);
    x.excluded = excluded_[i] != 0;
    x.numel = p.numel();
    x.p_dtype = *dtype_of(p.scalar_type());
    x.g_dtype = *dtype_of(g->scalar_type());
    x.group = static_cast<int32_t>(group_of_[i]);
    if (counts_home_.is_cpu()) {
      found.counts.push_back(row.step->mutable_data_ptr<float>());
      x.step = static_cast<double>(*found.counts.back()) + 1;
    } else {
      x.device_step = data(row.step);
    }
    found.tensors.push_back(x);
    found.active.push_back(i);
    return true;
  }

  void set_groups(const std::vector<double>& numbers, const std::vector<int64_t>& flags) {
    TORCH_CHECK_VALUE(numbers.size() == kind_.numbers * flags.size(),
                      "OptimizerTable.step: expected ", kind_.numbers, " numbers a group");
    lamb_groups_.clear();
    lars_groups_.clear();
    for (size_t k = 0; k < flags.size(); ++k) {
      const double* n = &numbers[kind_.numbers * k];
      const auto flag = [&](int bit) { return ((flags[k] >> bit) & 1) != 0; };
      if (kind_.lamb) {
        lamb_groups_.push_back({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], flag(0), flag(1),
                                flag(2), flag(3), flag(4), flag(5), flag(6), flag(7)});
      } else {
        lars_groups_.push_back({n[0], n[1], n[2], n[3], n[4], n[5], n[6], flag(0), flag(1), flag(2),
                                flag(3), flag(4), flag(5), flag(6)});
      }
    }
    for (const OptimizerTensor& x : found_.tensors) {
      TORCH_CHECK_INDEX(x.group >= 0 && x.group < static_cast<int64_t>(flags.size()),
                        "OptimizerTable.step: a parameter is of group ", x.group, ", got ",
                        flags.size(), " groups");
    }
  }

  void numbers_on_device(const State& grad_scale, const State& found_inf, const States& rates) {
    const auto check = [&](const Tensor& t, const char* name, at::ScalarType type, int64_t numel) {
      TORCH_CHECK_VALUE(t.device() == device_ && t.scalar_type() == type && t.numel() == numel &&
                            t.is_contiguous(),
                        "OptimizerTable.step: expected ", name, " of ", numel, " ", type, " on ",
                        device_, ", got ", t.sizes(), " ", t.scalar_type(), " on ", t.device());
    };
    TORCH_CHECK_VALUE(device_.is_cuda() || !(grad_scale || found_inf || !rates.empty()),
                      "OptimizerTable.step: numbers on the device are for a GPU");
    TORCH_CHECK_VALUE(!counts_home_.is_cpu() || !(found_inf || !rates.empty()),
                      "OptimizerTable.step: found_inf and rates go with step counts on the device");
    TORCH_CHECK_VALUE(rates.empty() || rates.size() == lamb_groups_.size() + lars_groups_.size(),
                      "OptimizerTable.step: expected rates of every group, got ", rates.size());
    device_numbers_ = {};
    if (grad_scale) {
      check(*grad_scale, "grad_scale", at::kFloat, 1);
      device_numbers_.grad_scale = grad_scale->const_data_ptr<float>();
    }
    if (found_inf) {
      check(*found_inf, "found_inf", at::kFloat, 1);
      device_numbers_.found_inf = found_inf->const_data_ptr<float>();
    }
    for (size_t k = 0; k < rates.size(); ++k) {
      if (!rates[k]) continue;
      check(*rates[k], "rates", at::kDouble, 2);
      const double* data = rates[k]->const_data_ptr<double>();
      (kind_.lamb ? lamb_groups_[k].device_rates : lars_groups_[k].device_rates) = data;
    }
  }

  LambArgs lamb() const {
    LambArgs result;
    result.tensors = found_.tensors.data();
    result.tensor_count = static_cast<int64_t>(found_.tensors.size());
    result.groups = lamb_groups_.data();
    result.group_count = static_cast<int32_t>(lamb_groups_.size());
    result.max_grad_norm = max_grad_norm_;
    result.clip_eps = clip_eps_;
    result.grad_scale = grad_scale_;
    result.device = device_numbers_;
    result.sm_margin = sm_margin_;
    return result;
  }

  LarsArgs lars() const {
    LarsArgs result;
    result.tensors = found_.tensors.data();
    result.tensor_count = static_cast<int64_t>(found_.tensors.size());
    result.groups = lars_groups_.data();
    result.group_count = static_cast<int32_t>(lars_groups_.size());
    result.max_grad_norm = max_grad_norm_;
    result.grad_scale = grad_scale_;
    result.device = device_numbers_;
    result.sm_margin = sm_margin_;
    return result;
  }

  Tensor bytes_on_device(size_t count) const {
    return at::empty({static_cast<int64_t>(count)},
                     at::TensorOptions().dtype(at::kByte).device(device_));
  }

  void step_on_device(const std::optional<Tensor>& grad_sum_sq, TensorStats* stats) {
    const c10::DeviceGuard guard(device_);
    upload();
    const double* sum = grad_sum_sq ? grad_sum_sq->const_data_ptr<double>() : nullptr;
    const void* table = table_.const_data_ptr();
    void* stream = current_stream(device_);
    const Tensor workspace = bytes_on_device(kind_.lamb ? lamb_workspace_bytes_cuda(lamb())
                                                        : lars_workspace_bytes_cuda(lars()));
    void* memory = workspace.mutable_data_ptr();
    raise_on(kind_.lamb
                 ? lamb_step_cuda(lamb(), table, memory, sum, stats, device_.index(), stream)
                 : lars_step_cuda(lars(), table, memory, sum, stats, device_.index(), stream));
  }

  // The table on the device, sent again only when it or the stream has changed. A new one goes to
  // new memory: kernels of the step before may still be reading the old, whose memory the caching
  // allocator hands out again in the order of the stream. A captured graph sends and reads a table
  // of its own, whenever it is replayed.
  void upload() {
    const auto count = static_cast<int64_t>(found_.tensors.size());
    next_entries_.resize(optimizer_entries_bytes_cuda(count));
    optimizer_describe_cuda(found_.tensors.data(), count, group_count_, next_entries_.data());
    void* stream = current_stream(device_);
    const bool captured = cuda_stream_captures(stream);
    if (!captured && table_.defined() && stream == table_stream_ && next_entries_ == entries_) {
      return;
    }
    const Tensor table = bytes_on_device(optimizer_table_bytes_cuda(found_.tensors.data(), count));
    raise_on(optimizer_send_table_cuda(found_.tensors.data(), count, next_entries_.data(),
                                       table.mutable_data_ptr(), device_.index(), stream));
    table_ = table;
    table_stream_ = stream;
    entries_.swap(next_entries_);
    if (captured) {
      captured_tables_.push_back(table);
      entries_.clear();  // not there before the first replay
    }
  }

  const Kind& kind_;
  std::vector<PyObject*> all_objects_;
  std::vector<PyTypeObject*> types_;  // of the tensors among them: torch.Tensor, Parameter
  std::vector<Handles> objects_of_;
  std::vector<int64_t> low_has_master_, group_of_, excluded_;
  std::vector<std::string> names_;
  c10::Device device_ = c10::Device(c10::kCPU);
  c10::Device counts_home_ = c10::Device(c10::kCPU);  // where the step counts are
  int32_t group_count_ = 0;

  Found found_;
  std::vector<LambGroup> lamb_groups_;
  std::vector<LarsGroup> lars_groups_;
  double max_grad_norm_ = 0, clip_eps_ = 0, grad_scale_ = 1;
  int32_t sm_margin_ = 0;
  DeviceNumbers device_numbers_;
  std::vector<size_t> seen_;  // what the rows of stats_ are of
  Tensor stats_;

  std::vector<uint8_t> entries_, next_entries_;  // of the table
  Tensor table_;
  std::vector<Tensor> captured_tables_;
  void* table_stream_ = nullptr;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(batchops, m) {
  // Why OptimizerTable cannot take a parameter with this state, "" where it can.
  m.def(
      "optimizer_unsupported(str kind, Tensor p, Tensor? first, Tensor? second, Tensor? master) -> "
      "str",
      [](const std::string& kind, const Tensor& p, const State& first, const State& second,
         const State& master) {
        const auto get = [](const State& t) { return t ? &*t : nullptr; };
        const std::string reason = unsupported_device(p);
        if (!reason.empty()) return reason;
        return unsupported(kind_of(kind), {&p, get(first), get(second), get(master)});
      });
  m.class_<OptimizerTable>("OptimizerTable")
      .def(torch::init<const std::string&, int64_t, int64_t, const std::vector<int64_t>&,
                       const std::vector<int64_t>&, const std::vector<int64_t>&,
                       const std::vector<int64_t>&, const std::vector<int64_t>&,
                       std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>,
                       std::vector<std::string>>())
      .def("prepare", &OptimizerTable::prepare)
      .def("grad_sum_sq", &OptimizerTable::grad_sum_sq)
      .def("step", &OptimizerTable::step)
      .def("stats", &OptimizerTable::stats);
}

}  // namespace batchops::binding
