// The CPU implementations of the ops of updates, whose schemas portllm/ops.py defines:
//   lowrank_add_cpu_(
//       Tensor(a!)[] weights, Tensor[] lora_A, Tensor[] lora_B, float[] scalings, int[] n_terms,
//       int[] modes=[]) -> ()
//   lowrank_add_cpu_prepare(the same) -> int, and with what it returns
//   lowrank_add_cpu_run(int prepared) -> (), lowrank_add_cpu_release(int prepared) -> ()
//   lowrank_exchange_cpu_(
//       Tensor(a!)[] weights, Tensor[] lora_A, Tensor[] lora_B, float[] scalings, int[] n_old, int[] n_new,
//       Tensor lengths, Tensor data) -> (Tensor lengths, Tensor data, Tensor ends)
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/lowrank_add.h"

namespace {

// How many weights a thread reads at least.
constexpr int64_t kGrain = 1024;

// The first five arguments of an op, and its modes, if it has them. They keep the tensors, not their memory: each read finds where it is now.
struct Arguments {
  explicit Arguments(StableIValue* stack, bool has_modes)
      : tensors(stack[0]),
        lora_A(stack[1]),
        lora_B(stack[2]),
        scalings(stack[3]),
        n_terms(integers(stack[4])),
        modes(has_modes ? integers(stack[5]) : std::vector<int64_t>{}) {}

  Tensors tensors, lora_A, lora_B;
  List scalings;
  std::vector<int64_t> n_terms;
  std::vector<int64_t> modes;
};

// Of a weight's flags, key, row and column; the flags are those of portllm/noise.py.
portllm::Mode mode_of(const int64_t* numbers) {
  const int64_t flags = numbers[0];
  STD_TORCH_CHECK(flags >= 0 && flags < 8, "lowrank_add_cpu_: unknown flags among the modes");
  portllm::Mode mode;
  mode.stochastic = flags & 1;
  mode.keep_zeros = flags & 2;
  mode.flipped = flags & 4;
  mode.key = static_cast<uint64_t>(numbers[1]);
  mode.row = static_cast<uint32_t>(numbers[2]);
  mode.column = static_cast<uint32_t>(numbers[3]);
  return mode;
}

struct Problem {
  std::vector<portllm::Weight> weights;
  std::vector<portllm::Term> terms;
};

// Refuses all that `_check` in portllm/ops.py does, which then says why.
Problem read(const Arguments& given) {
  const auto count = static_cast<int64_t>(given.tensors.size());
  const auto total = static_cast<int64_t>(given.lora_A.size());
  STD_TORCH_CHECK(given.n_terms.size() == given.tensors.size() &&
                      given.lora_B.size() == given.lora_A.size() &&
                      given.scalings.size() == given.lora_A.size() &&
                      (given.modes.empty() || given.modes.size() == 4 * given.tensors.size()),
                  "lowrank_add_cpu_: the lists do not have fitting lengths");
  Problem problem{std::vector<portllm::Weight>(count), std::vector<portllm::Term>(total)};
  auto& [weights, terms] = problem;
  int64_t end = 0;
  // One after the other: to end the sharing of a lazy copy is not allowed to several threads.
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = given.n_terms[i];
    const auto w = read(given.tensors.get<AtenTensorHandle>(i), true);
    STD_TORCH_CHECK(w && n > 0 && n <= total - end, "lowrank_add_cpu_: weights[", i,
                    "] must be a 2-D tensor of floats on the CPU, with one term or more");
    weights[i] = {w->matrix, w->rows, w->cols, {terms.data() + end, static_cast<size_t>(n)}};
    if (!given.modes.empty()) weights[i].mode = mode_of(&given.modes[4 * i]);
    end += n;
  }
  std::atomic<bool> fit = end == total;
  // Factors lie anywhere in memory, so that their attributes come faster to several threads.
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const portllm::Weight& weight = weights[i];
      for (portllm::Term& term : weight.terms) {
        const size_t t = &term - terms.data();
        const auto a = read(given.lora_A.get<AtenTensorHandle>(t));
        const auto b = read(given.lora_B.get<AtenTensorHandle>(t));
        if (a && b && b->rows == weight.rows && a->cols == weight.cols && a->rows == b->cols &&
            a->rows > 0) {
          term = {a->matrix, b->matrix, a->rows, given.scalings.get<double>(t)};
        } else {
          fit = false;
        }
      }
    }
  });
  STD_TORCH_CHECK(fit, "lowrank_add_cpu_: factors must be floats on the CPU that fit their weight");
  return problem;
}

// Threads take blocks themselves: that also holds inside another parallel region, where torch
// gives the whole range to one thread. What one thread can do is done here, without waking any.
void work(portllm::Job& job) {
  torch::stable::parallel_for(0, job.threads(), 1, [&](int64_t, int64_t) { job.work(); });
}

// All is checked before the first write.
void lowrank_add_(const Arguments& given) {
  Problem problem = read(given);
  portllm::Job job(isa(), std::move(problem.weights), threads());
  work(job);
}

void lowrank_add_cpu_(StableIValue* stack, uint64_t, uint64_t) { lowrank_add_(Arguments(stack, true)); }

// A 1-D contiguous tensor on the CPU.
template <class T>
T* elements(const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_cpu() && tensor.is_contiguous() &&
                      tensor.scalar_type() == dtype,
                  "lowrank_exchange_cpu_: lengths must be int16 [n] and data uint8 [n], on the CPU");
  return static_cast<T*>(tensor.data_ptr());
}

// One job: takes off the old terms with the help of the record, adds the new ones and records them.
class Exchange {
 public:
  Exchange(std::vector<portllm::Weight> weights, const Tensor& lengths, const Tensor& data)
      : count_(weights.size()), ends_(torch::stable::new_empty(data, {2 * count_}, ScalarType::Long)) {
    auto* old_lengths = elements<const uint16_t>(lengths, ScalarType::Short);
    auto* old_data = elements<const uint8_t>(data, ScalarType::Byte);
    auto* ends = static_cast<int64_t*>(ends_.data_ptr());
    int64_t old_chunks = 0, chunks = 0;
    for (int64_t i = 0; i < count_; ++i) {
      portllm::Weight& weight = weights[i];
      const bool records = weight.terms.size() > weight.old_terms;
      if (weight.old_terms > 0) old_chunks += weight.chunks();
      if (records) chunks += weight.chunks();
      ends[2 * i] = chunks;
    }
    STD_TORCH_CHECK(old_chunks == lengths.numel(), "lowrank_exchange_cpu_: the record has ",
                    lengths.numel(), " chunks, but the weights that it is for have ", old_chunks);
    lengths_ = torch::stable::new_empty(lengths, {chunks});
    auto* new_lengths = static_cast<uint16_t*>(lengths_.data_ptr());
    for (int64_t i = 0; i < count_; ++i) {
      portllm::Weight& weight = weights[i];
      if (weight.old_terms > 0) {
        weight.record = {old_lengths, old_data};
        old_lengths += weight.chunks();
      }
      if (weight.terms.size() > weight.old_terms) {
        weight.lengths = new_lengths;
        new_lengths += weight.chunks();
      }
    }
    job_.emplace(isa(), std::move(weights), threads());
    STD_TORCH_CHECK(job_->old_bytes() == data.numel(), "lowrank_exchange_cpu_: the record has ",
                    data.numel(), " bytes, where its lengths add up to ", job_->old_bytes());
  }

  void run() {
    work(*job_);
    STD_TORCH_CHECK(job_->fits(),
                    "lowrank_exchange_cpu_: the record is not that of what was added to these weights, "
                    "which are no longer what they were");
  }

  // (lengths, data, ends)
  void give(const Tensor& like, StableIValue* stack) {
    auto* ends = static_cast<int64_t*>(ends_.data_ptr());
    const std::vector<int64_t> bytes = job_->recorded_ends();
    for (int64_t i = 0; i < count_; ++i) ends[2 * i + 1] = bytes[i];
    Tensor data = torch::stable::new_empty(like, {bytes.empty() ? 0 : bytes.back()});
    auto* out = static_cast<uint8_t*>(data.data_ptr());
    const int64_t parts = job_->threads();
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (; first < last; ++first) job_->copy_recorded(out, first, parts);
    });
    stack[0] = torch::stable::detail::from(lengths_);
    stack[1] = torch::stable::detail::from(data);
    stack[2] = torch::stable::detail::from(ends_);
  }

 private:
  int64_t count_;
  Tensor lengths_, ends_;
  std::optional<portllm::Job> job_;
};

void lowrank_exchange_cpu_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack, false);
  const std::vector<int64_t> n_old = given.n_terms, n_new = integers(stack[5]);
  const auto lengths = torch::stable::detail::to<Tensor>(stack[6]);
  const auto data = torch::stable::detail::to<Tensor>(stack[7]);
  bool fit = n_old.size() == n_new.size();
  for (size_t i = 0; fit && i < n_old.size(); ++i) {
    fit = n_old[i] >= 0 && n_new[i] >= 0;
    given.n_terms[i] += n_new[i];
  }
  STD_TORCH_CHECK(fit, "lowrank_exchange_cpu_: n_old and n_new must have an entry for each weight");
  Problem problem = read(given);
  std::vector<portllm::Weight>& weights = problem.weights;
  bool takes_off = false, adds = false;
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i].old_terms = static_cast<size_t>(n_old[i]);
    takes_off |= n_old[i] > 0;
    adds |= n_new[i] > 0;
  }
  // A matrix unit sums all terms of a weight together, so there what is taken off goes first.
  if (takes_off && adds && isa().matrix_rank > 0) {
    std::vector<portllm::Weight> old, now;
    for (const portllm::Weight& weight : weights) {
      if (weight.old_terms > 0) {
        old.push_back(weight);
        old.back().terms = weight.terms.first(weight.old_terms);
      }
      now.push_back(weight);
      now.back().terms = weight.terms.subspan(weight.old_terms);
      now.back().old_terms = 0;
    }
    Exchange first(std::move(old), lengths, data);
    const Tensor no_lengths = torch::stable::new_empty(lengths, {0});
    const Tensor no_data = torch::stable::new_empty(data, {0});
    Exchange second(std::move(now), no_lengths, no_data);
    first.run();
    second.run();
    return second.give(data, stack);
  }
  Exchange exchange(std::move(weights), lengths, data);
  exchange.run();
  exchange.give(data, stack);
}

// Prepared calls by number, so that no number leads to memory that is not one. A run shares its call
// with this map: another thread may release it meanwhile.
class Calls {
 public:
  int64_t add(std::shared_ptr<const Arguments> call) {
    const std::lock_guard lock(mutex_);
    calls_.emplace(++last_, std::move(call));
    return last_;
  }

  std::shared_ptr<const Arguments> find(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = calls_.find(number);
    STD_TORCH_CHECK(found != calls_.end(), "lowrank_add_cpu_: no call ", number, " is prepared");
    return found->second;
  }

  void erase(int64_t number) {
    const auto call = find(number);  // its tensors go when the lock is free again
    const std::lock_guard lock(mutex_);
    calls_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Arguments>> calls_;
  int64_t last_ = 0;
};

Calls& calls() {
  static Calls* const all = new Calls;  // never destroyed: at the end of the process torch may go first
  return *all;
}

void prepare(StableIValue* stack, uint64_t, uint64_t) {
  auto call = std::make_shared<const Arguments>(stack, true);
  read(*call);
  stack[0] = torch::stable::detail::from(calls().add(std::move(call)));
}

void run(StableIValue* stack, uint64_t, uint64_t) {
  lowrank_add_(*calls().find(torch::stable::detail::to<int64_t>(stack[0])));
}

void release(StableIValue* stack, uint64_t, uint64_t) {
  calls().erase(torch::stable::detail::to<int64_t>(stack[0]));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(portllm, CPU, m) {
  m.impl("lowrank_add_cpu_", lowrank_add_cpu_);
  m.impl("lowrank_add_cpu_prepare", prepare);
  m.impl("lowrank_exchange_cpu_", lowrank_exchange_cpu_);
}

// Without a tensor among the arguments there is no device to go by.
STABLE_TORCH_LIBRARY_IMPL(portllm, CompositeExplicitAutograd, m) {
  m.impl("lowrank_add_cpu_run", run);
  m.impl("lowrank_add_cpu_release", release);
}
