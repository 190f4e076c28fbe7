// A model of one multiprocessor (compute capability 9.0) that runs the loop of a kernel: when each
// of its warps issues each instruction, and what it waits for until then. model_cuda.py writes what
// is read here and says what it is good for.
//
// stdin: blocks, warps of a block, turns of the loop, traces; each trace as its length and that
// many instructions of seven numbers (see Instruction); then the trace of each warp of a block.
// stdout: cycles of a turn; shares of the time in which schedulers issue, tensor cores multiply and
// shared memory is busy; and of the time of warps, what they wait for.

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <queue>
#include <string>
#include <vector>

namespace {

constexpr int kSchedulers = 4;
constexpr int kScoreboards = 6;
// Cycles. A product of 16 x 16 by 16 x 8 keeps the tensor core of a scheduler busy for 6.2: 613
// TFLOP/s of an H200. What else is not the machine code's own is as published measurements of this
// and of older architectures have it.
constexpr long kProduct16 = 6, kProduct8 = 4, kProductLatency = 24;
constexpr long kSharedLatency = 24, kMemoryLatency = 900, kBarrierLatency = 20;
constexpr long kOtherLatency = 25, kOtherEvery = 4;
constexpr long kQueueDelay = 4, kQueueEvery = 2;
constexpr size_t kQueueLength = 4;       // of what waits for shared memory, for each scheduler
constexpr double kBytesPerCycle = 18.4;  // of DRAM: 4.26 TB/s, 132 multiprocessors, 1.755 GHz

enum Kind { kArithmetic, kProduct, kShared, kCopy, kStore, kBarrier, kCommit, kWait, kOther };

struct Instruction {
  int kind;
  int stall;  // cycles until the warp may issue again
  int write, read,
      awaited;  // scoreboards: of the result, of the operands (7: none); bits to wait for
  int cost;     // turns of shared memory; inner size of a product; batches that may be under way
  int bytes;    // of DRAM
};

struct Warp {
  int block = 0;
  const std::vector<Instruction>* trace = nullptr;
  size_t next = 0;
  int turns = 0;
  long ready = 0;
  bool at_barrier = false;
  std::array<int, kScoreboards> pending{};
  std::vector<long> batches;  // when each batch of copies has arrived
  long arrival = 0;           // of the last copy
};

struct Queued {
  int warp;
  const Instruction* instruction;
  long from;
};

struct Completion {
  long time;
  int warp, scoreboard;
  bool operator>(const Completion& other) const { return time > other.time; }
};

class Multiprocessor {
 public:
  Multiprocessor(int blocks, std::vector<const std::vector<Instruction>*> traces, int turns)
      : block_warps_(static_cast<int>(traces.size())),
        turns_(turns),
        waiting_(blocks),
        done_(blocks) {
    for (int block = 0; block < blocks; ++block)
      for (const auto* trace : traces) {
        Warp warp;
        warp.block = block;
        warp.trace = trace;
        warps_.push_back(warp);
      }
  }

  void run() {
    const size_t half = static_cast<size_t>(turns_) / 2;
    for (; ends_.size() < static_cast<size_t>(turns_); ++now_) {
      if (now_ > 100'000'000) std::exit(2);
      if (ends_.size() == half && begin_ == 0) {
        begin_ = now_;
        issued_ = multiplying_ = sharing_ = 0;
        waits_.clear();
      }
      for (; !completions_.empty() && completions_.top().time <= now_; completions_.pop())
        --warps_[completions_.top().warp].pending[completions_.top().scoreboard];
      serve_shared_memory();
      for (int scheduler = 0; scheduler < kSchedulers; ++scheduler) issue(scheduler);
    }
    const double cycles = static_cast<double>(now_ - begin_);
    long waited = 0;
    for (const auto& [reason, count] : waits_) waited += count;
    std::printf("%.1f %.4f %.4f %.4f",
                static_cast<double>(ends_.back() - ends_[half - 1]) / (turns_ - half),
                issued_ / cycles / kSchedulers, multiplying_ / cycles / kSchedulers,
                sharing_ / cycles);
    for (const auto& [reason, count] : waits_)
      std::printf(" %s %.4f", reason.c_str(), static_cast<double>(count) / waited);
    std::printf("\n");
  }

 private:
  void complete(long time, int warp, int scoreboard) {
    if (scoreboard < kScoreboards) completions_.push({time, warp, scoreboard});
  }

  void expect(Warp& warp, int scoreboard) {
    if (scoreboard < kScoreboards) ++warp.pending[scoreboard];
  }

  // One queue after the other, one instruction at a time.
  void serve_shared_memory() {
    if (shared_free_ > now_) return;
    for (int i = 0; i < kSchedulers; ++i) {
      const int scheduler = (shared_turn_ + i) % kSchedulers;
      auto& queue = queues_[scheduler];
      if (queue.empty() || queue.front().from > now_) continue;
      const auto [warp, instruction, from] = queue.front();
      queue.pop_front();
      shared_turn_ = scheduler + 1;
      shared_free_ = now_ + instruction->cost;
      sharing_ += instruction->cost;
      if (instruction->kind != kShared)
        memory_free_ =
            std::max(memory_free_, static_cast<double>(now_)) + instruction->bytes / kBytesPerCycle;
      if (instruction->kind == kShared)
        complete(shared_free_ + kSharedLatency, warp, instruction->write);
      if (instruction->kind == kCopy)
        warps_[warp].arrival =
            std::max(warps_[warp].arrival, static_cast<long>(memory_free_) + kMemoryLatency);
      complete(shared_free_ + (instruction->kind == kStore ? kSharedLatency : 6), warp,
               instruction->read);
      return;
    }
  }

  // What keeps a warp from issuing; null: nothing.
  const char* obstacle(int scheduler, const Warp& warp) const {
    if (warp.at_barrier) return "barrier";
    if (warp.ready > now_) return "latency";
    const Instruction& next = (*warp.trace)[warp.next];
    for (int i = 0; i < kScoreboards; ++i)
      if ((next.awaited >> i & 1) != 0 && warp.pending[i] > 0) return "scoreboard";
    const auto& queue = queues_[scheduler];
    switch (next.kind) {
      case kProduct:
        return tensor_free_[scheduler] > now_ ? "tensor" : nullptr;
      case kOther:
        return other_free_[scheduler] > now_ ? "other" : nullptr;
      case kShared:
      case kCopy:
      case kStore:
        return queue.size() >= kQueueLength || queue_free_[scheduler] > now_ ? "shared" : nullptr;
      case kCommit:  // its copies must have left the queue
        return std::any_of(queue.begin(), queue.end(),
                           [&](const Queued& queued) {
                             return &warps_[queued.warp] == &warp &&
                                    queued.instruction->kind == kCopy;
                           })
                   ? "shared"
                   : nullptr;
      case kWait: {
        const int count = static_cast<int>(warp.batches.size()) - next.cost;
        return count > 0 && warp.batches[count - 1] > now_ ? "memory" : nullptr;
      }
      default:
        return nullptr;
    }
  }

  // Warps take turns.
  void issue(int scheduler) {
    const int number = static_cast<int>(warps_.size());
    const int count = (number + kSchedulers - 1) / kSchedulers;
    int chosen = -1;
    for (int i = 1; i <= count && chosen < 0; ++i) {
      const int warp = (last_[scheduler] + i) % count * kSchedulers + scheduler;
      if (warp >= number) continue;
      const char* reason = obstacle(scheduler, warps_[warp]);
      if (reason == nullptr) {
        chosen = warp;
      } else {
        ++waits_[reason];
      }
    }
    if (chosen < 0) return;
    last_[scheduler] = chosen / kSchedulers;
    ++issued_;
    execute(scheduler, chosen);
  }

  void execute(int scheduler, int number) {
    Warp& warp = warps_[number];
    const Instruction& it = (*warp.trace)[warp.next];
    warp.ready = now_ + std::max(1, it.stall);
    switch (it.kind) {
      case kProduct: {
        const long busy = it.cost == 8 ? kProduct8 : kProduct16;
        tensor_free_[scheduler] = now_ + busy;
        multiplying_ += busy;
        expect(warp, it.write);
        complete(now_ + kProductLatency, number, it.write);
        expect(warp, it.read);
        complete(now_ + busy, number, it.read);
        break;
      }
      case kOther:
        other_free_[scheduler] = now_ + kOtherEvery;
        expect(warp, it.write);
        complete(now_ + kOtherLatency, number, it.write);
        break;
      case kShared:
      case kCopy:
      case kStore:
        if (it.kind == kShared) expect(warp, it.write);
        expect(warp, it.read);
        queues_[scheduler].push_back({number, &it, now_ + kQueueDelay});
        queue_free_[scheduler] = now_ + kQueueEvery;
        break;
      case kCommit:
        warp.batches.push_back(warp.arrival);
        break;
      case kBarrier:
        warp.at_barrier = true;
        if (++waiting_[warp.block] == block_warps_) {
          waiting_[warp.block] = 0;
          for (Warp& other : warps_)
            if (other.block == warp.block) {
              other.at_barrier = false;
              other.ready = std::max(other.ready, now_ + kBarrierLatency);
            }
        }
        break;
      default:
        break;
    }
    if (++warp.next < warp.trace->size()) return;
    warp.next = 0;
    if (++done_[warp.block] == block_warps_) {
      done_[warp.block] = 0;
      if (warp.block == 0) ends_.push_back(now_);
    }
  }

  int block_warps_, turns_;
  std::vector<Warp> warps_;
  std::vector<int> waiting_, done_;  // warps of each block: at the barrier, at the end of a turn
  std::priority_queue<Completion, std::vector<Completion>, std::greater<>> completions_;
  std::array<std::deque<Queued>, kSchedulers> queues_;
  std::array<long, kSchedulers> tensor_free_{}, other_free_{}, queue_free_{};
  std::array<int, kSchedulers> last_{};
  long shared_free_ = 0, now_ = 0, begin_ = 0;
  int shared_turn_ = 0;
  double memory_free_ = 0.0;
  std::vector<long> ends_;  // of the turns of the first block
  double issued_ = 0.0, multiplying_ = 0.0, sharing_ = 0.0;
  std::map<std::string, long> waits_;
};

template <class T>
T read_number() {
  long number = 0;
  if (std::scanf("%ld", &number) != 1) std::exit(1);
  return static_cast<T>(number);
}

}  // namespace

int main() {
  const int blocks = read_number<int>(), warps = read_number<int>(), turns = read_number<int>();
  std::vector<std::vector<Instruction>> traces(read_number<size_t>());
  for (auto& trace : traces) {
    trace.resize(read_number<size_t>());
    for (Instruction& it : trace)
      for (int* number :
           {&it.kind, &it.stall, &it.write, &it.read, &it.awaited, &it.cost, &it.bytes})
        *number = read_number<int>();
  }
  std::vector<const std::vector<Instruction>*> of_warps;
  for (int i = 0; i < warps; ++i) of_warps.push_back(&traces.at(read_number<size_t>()));
  Multiprocessor(blocks, of_warps, turns).run();
  return 0;
}
