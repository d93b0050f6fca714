// torch.classes.batchops.LambTable: the tensors of one optimizer on one device, and LAMB's step
// over them as one call. It holds the tensors, not their addresses: .grad, storages, sizes and
// strides are read anew in every step, so nothing in it can be out of date but the handles
// themselves, which its Python owner compares.
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "kernels/info.h"
#include "kernels/lamb.h"
#include "torch/common.h"

namespace batchops::binding {
namespace {

using at::Tensor;

constexpr const char* kOp = "LAMB.step";

void raise_on(const char* message) { TORCH_CHECK(message == nullptr, kOp, ": ", message); }

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

// Why the kernels cannot serve these tensors; empty if they can.
std::string unsupported(const Tensor& p, const Tensor* exp_avg, const Tensor* exp_avg_sq) {
  const auto text = [](const auto&... parts) { return c10::str(parts...); };
  if (p.layout() != at::kStrided || p.unsafeGetTensorImpl()->is_python_dispatch()) {
    return "expected a plain strided tensor";
  }
  if (!p.is_cpu() && !p.is_cuda()) return text("expected a CPU or CUDA tensor, got ", p.device());
  if (p.is_cuda() && !built_with_cuda()) return "batchops was built without CUDA";
  if (!kernel_dtype(p)) {
    return text("expected float32, float16 or bfloat16, got ", p.scalar_type());
  }
  if (!p.is_non_overlapping_and_dense()) {
    return text("expected memory without gaps, got size ", p.sizes(), " with strides ",
                p.strides());
  }
  if (p.is_conj() || p.is_neg()) return "expected a tensor without a lazy conjugate or minus";
  for (const auto& [name, state] : {std::pair{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}}) {
    if (state == nullptr) continue;
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
  }
  return "";
}

class LambTable : public torch::CustomClassHolder {
 public:
  LambTable(std::vector<Tensor> params, std::vector<Tensor> exp_avgs,
            std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps,
            std::vector<int64_t> group_of, std::vector<std::string> names)
      : params_(std::move(params)),
        exp_avgs_(std::move(exp_avgs)),
        exp_avg_sqs_(std::move(exp_avg_sqs)),
        steps_(std::move(steps)),
        group_of_(std::move(group_of)),
        names_(std::move(names)) {
    const size_t n = params_.size();
    TORCH_CHECK_VALUE(n > 0 && exp_avgs_.size() == n && exp_avg_sqs_.size() == n &&
                          steps_.size() == n && group_of_.size() == n && names_.size() == n,
                      "LambTable: expected lists of one length, at least 1, got ", n, ", ",
                      exp_avgs_.size(), ", ", exp_avg_sqs_.size(), ", ", steps_.size(), ", ",
                      group_of_.size(), ", ", names_.size());
    device_ = params_[0].device();
  }

  // Reads .grad of every parameter and checks what the step will touch. -1, or the index of a
  // parameter that these kernels cannot serve any more, since its dtype, device or strides changed.
  int64_t prepare() {
    tensors_.clear();
    active_.clear();
    kept_.clear();
    for (size_t i = 0; i < params_.size(); ++i) {
      const Tensor& p = params_[i];
      const Tensor& grad = p.grad();
      if (!grad.defined()) continue;
      if (p.device() != device_ || !unsupported(p, &exp_avgs_[i], &exp_avg_sqs_[i]).empty() ||
          !steps_[i].is_cpu() || steps_[i].scalar_type() != at::kFloat || steps_[i].numel() != 1) {
        return static_cast<int64_t>(i);
      }
      check_grad(p, grad, names_[i]);
      add(i, p, grad);
    }
    return -1;
  }

  // Σ grad², a 0-dim float64 tensor on the device; of what prepare() has read.
  Tensor grad_sum_sq() {
    Tensor sum = at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(device_));
    if (tensors_.empty()) return sum;
    if (device_.is_cpu()) {
      raise_on(lamb_grad_sum_sq_cpu(args(), sum.mutable_data_ptr<double>(), torch_threads()));
      return sum;
    }
    const c10::DeviceGuard guard(device_);
    upload();
    const Tensor workspace = bytes_on_device(lamb_workspace_bytes_cuda(args()));
    raise_on(lamb_grad_sum_sq_cuda(args(), table_.const_data_ptr(), workspace.mutable_data_ptr(),
                                   sum.mutable_data_ptr<double>(), device_.index(),
                                   current_stream(device_)));
    return sum;
  }

  // prepare(), then the step. `numbers` holds lr, beta1, beta2, eps and weight_decay of each group,
  // `flags` bias_correction, grad_averaging, trust_clip, always_adapt and maximize as bits 0 to 4.
  // max_grad_norm 0 is no clip; grad_sum_sq counts gradients that other tables hold as well.
  int64_t step(const std::vector<double>& numbers, const std::vector<int64_t>& flags,
               double max_grad_norm, const std::optional<Tensor>& grad_sum_sq) {
    const int64_t stale = prepare();
    if (stale >= 0) return stale;
    set_groups(numbers, flags);
    max_grad_norm_ = max_grad_norm;
    if (tensors_.empty()) return -1;

    if (device_.is_cpu()) {
      const double* sum = grad_sum_sq ? grad_sum_sq->const_data_ptr<double>() : nullptr;
      raise_on(lamb_step_cpu(args(), sum, torch_threads()));
    } else {
      step_on_device(grad_sum_sq);
    }
    for (size_t k = 0; k < active_.size(); ++k) {
      const size_t i = active_[k];
      *steps_[i].mutable_data_ptr<float>() = static_cast<float>(tensors_[k].step);
      // Autograd must notice that what it may have saved has changed.
      for (const Tensor* t : {&params_[i], &exp_avgs_[i], &exp_avg_sqs_[i]}) {
        if (!t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
      }
    }
    kept_.clear();
    return -1;
  }

 private:
  static void check_grad(const Tensor& p, const Tensor& grad, const std::string& name) {
    TORCH_CHECK(grad.layout() == at::kStrided, kOp, ": ", name,
                " has a sparse gradient; expected a dense one");
    TORCH_CHECK(!grad.is_complex(), kOp, ": ", name,
                " has a complex gradient; expected a real one");
    TORCH_CHECK(at::isFloatingType(grad.scalar_type()) && grad.sizes() == p.sizes() &&
                    grad.device() == p.device(),
                kOp, ": ", name, " expects a floating-point gradient of size ", p.sizes(), " on ",
                p.device(), ", got ", grad.scalar_type(), " of size ", grad.sizes(), " on ",
                grad.device());
    // A subclass that wraps other tensors, or storage that was given back: no memory to read.
    TORCH_CHECK(!grad.unsafeGetTensorImpl()->is_python_dispatch(), kOp, ": ", name,
                " expects a gradient that is a plain tensor; fused=False takes subclasses");
    TORCH_CHECK(
        grad._is_zerotensor() || grad.numel() == 0 ||
            grad.storage().nbytes() >=
                static_cast<size_t>(grad.storage_offset() + span(grad)) * grad.element_size(),
        kOp, ": ", name, " has a gradient whose storage is too small for its size ", grad.sizes());
  }

  // Elements from the first to the last, inclusive.
  static int64_t span(const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return last + 1;
  }

  void add(size_t i, const Tensor& p, const Tensor& grad) {
    Tensor g = grad;
    if (g.is_neg() || g._is_zerotensor() || !kernel_dtype(g) || !same_layout(g, p)) {
      // Rare: a layout of its own, or a dtype no kernel takes. One copy in the parameter's layout.
      const auto type = kernel_dtype(g) ? g.scalar_type() : at::kFloat;
      g = at::empty_strided(p.sizes(), p.strides(), g.options().dtype(type)).copy_(g);
      kept_.push_back(g);
    }
    LambTensor x;
    x.p = p.mutable_data_ptr();
    x.g = g.const_data_ptr();
    x.m = exp_avgs_[i].mutable_data_ptr<float>();
    x.v = exp_avg_sqs_[i].mutable_data_ptr<float>();
    x.numel = p.numel();
    x.p_dtype = *dtype_of(p.scalar_type());
    x.g_dtype = *dtype_of(g.scalar_type());
    x.group = static_cast<int32_t>(group_of_[i]);
    x.step = static_cast<double>(*steps_[i].const_data_ptr<float>()) + 1;
    tensors_.push_back(x);
    active_.push_back(i);
  }

  void set_groups(const std::vector<double>& numbers, const std::vector<int64_t>& flags) {
    TORCH_CHECK_VALUE(numbers.size() == 5 * flags.size(),
                      "LambTable.step: expected 5 numbers a group");
    groups_.resize(flags.size());
    for (size_t k = 0; k < flags.size(); ++k) {
      const double* n = &numbers[5 * k];
      const auto flag = [&](int bit) { return ((flags[k] >> bit) & 1) != 0; };
      groups_[k] = {n[0], n[1], n[2], n[3], n[4], flag(0), flag(1), flag(2), flag(3), flag(4)};
    }
    for (const LambTensor& x : tensors_) {
      TORCH_CHECK_INDEX(x.group >= 0 && x.group < static_cast<int64_t>(groups_.size()),
                        "LambTable.step: a parameter is of group ", x.group, ", got ",
                        groups_.size(), " groups");
    }
  }

  LambArgs args() {
    if (groups_.empty()) {  // sums alone: the tensors' groups do not matter yet
      groups_.resize(1 + *std::max_element(group_of_.begin(), group_of_.end()));
    }
    LambArgs result;
    result.tensors = tensors_.data();
    result.tensor_count = static_cast<int64_t>(tensors_.size());
    result.groups = groups_.data();
    result.group_count = static_cast<int32_t>(groups_.size());
    result.max_grad_norm = max_grad_norm_;
    return result;
  }

  Tensor bytes_on_device(size_t count) const {
    return at::empty({static_cast<int64_t>(count)},
                     at::TensorOptions().dtype(at::kByte).device(device_));
  }

  void step_on_device(const std::optional<Tensor>& grad_sum_sq) {
    const c10::DeviceGuard guard(device_);
    upload();
    const Tensor workspace = bytes_on_device(lamb_workspace_bytes_cuda(args()));
    raise_on(lamb_step_cuda(args(), table_.const_data_ptr(), workspace.mutable_data_ptr(),
                            grad_sum_sq ? grad_sum_sq->const_data_ptr<double>() : nullptr,
                            device_.index(), current_stream(device_)));
  }

  // The table on the device, sent again only when it or the stream has changed. A new one goes to
  // new memory: kernels of the step before may still be reading the old, whose memory the caching
  // allocator hands out again in the order of the stream.
  void upload() {
    const LambArgs now = args();
    next_host_table_.resize(lamb_table_bytes_cuda(now));
    lamb_write_table_cuda(now, next_host_table_.data());
    void* stream = current_stream(device_);
    if (table_.defined() && stream == table_stream_ && next_host_table_ == host_table_) return;
    const auto size = static_cast<int64_t>(next_host_table_.size());
    const Tensor host = at::empty({size}, at::TensorOptions().dtype(at::kByte));
    std::memcpy(host.mutable_data_ptr(), next_host_table_.data(), next_host_table_.size());
    Tensor table = bytes_on_device(next_host_table_.size());
    // From pageable memory: the driver has taken its own copy of `host` when this returns.
    table.copy_(host, /*non_blocking=*/true);
    table_ = table;
    table_stream_ = stream;
    host_table_.swap(next_host_table_);
  }

  std::vector<Tensor> params_, exp_avgs_, exp_avg_sqs_, steps_;
  std::vector<int64_t> group_of_;
  std::vector<std::string> names_;
  c10::Device device_ = c10::Device(c10::kCPU);

  std::vector<LambTensor> tensors_;  // of parameters with a gradient
  std::vector<size_t> active_;       // their indices
  std::vector<Tensor> kept_;         // copies of gradients, for the duration of a step
  std::vector<LambGroup> groups_;
  double max_grad_norm_ = 0;

  std::vector<uint8_t> host_table_, next_host_table_;
  Tensor table_;
  void* table_stream_ = nullptr;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(batchops, m) {
  // Why LambTable cannot take a parameter with this state, "" where it can.
  m.def("lamb_unsupported(Tensor p, Tensor? exp_avg, Tensor? exp_avg_sq) -> str",
        [](const Tensor& p, const std::optional<Tensor>& m, const std::optional<Tensor>& v) {
          return unsupported(p, m ? &*m : nullptr, v ? &*v : nullptr);
        });
  m.class_<LambTable>("LambTable")
      .def(torch::init<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
                       std::vector<Tensor>, std::vector<int64_t>, std::vector<std::string>>())
      .def("prepare", &LambTable::prepare)
      .def("grad_sum_sq", &LambTable::grad_sum_sq)
      .def("step", &LambTable::step);
}

}  // namespace batchops::binding
