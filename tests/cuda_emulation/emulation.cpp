// Runs CUDA kernels on one CPU thread, to check their logic where there is no GPU.
//
// Each thread of a block is a fiber. Warps run in random order from one __syncthreads() to the
// next, so that a result that depends on their order shows. Products and loads of matrices are
// where the 32 lanes of a warp meet: the last one to arrive computes for all. Shared memory begins
// as NaN. Asynchronous copies happen as late as they may, when they are waited for; with a seed,
// half of them at once, which shows what they overwrite too soon. What a GPU would not forgive ends
// the process with a message: a barrier that not all reach, an address out of shared memory or not
// aligned.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "emulated_device.h"

namespace emulation {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr int kGrantedAlways = 48 << 10;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Copy {
  void* shared;
  const void* source;
  int bytes;
  bool inside;
};

// AddressSanitizer follows swapcontext; the jumps, which are ten times as fast, confuse it.
struct Context {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
};

void switch_to(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  swapcontext(&from.context, &to.context);
#else
  if (_setjmp(from.jump) != 0) return;
  from.started = true;
  if (to.started) _longjmp(to.jump, 1);
  to.started = true;
  setcontext(&to.context);
#endif
}

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kReady;
  std::vector<std::vector<Copy>> batches;  // of copies that were committed
  std::vector<Copy> open;
  int meetings = 0;  // of its warp that it took part in
};

// What the lanes of a warp bring to a meeting and take from it. Two of each: fast lanes may bring
// what is for the next meeting before slow ones have taken theirs.
struct Meeting {
  const void* rows[kLanes];
  uint32_t a[kLanes][4], b[kLanes][2];
  float sums[kLanes][4];
};

struct WarpState {
  Meeting meetings[2];
  int arrived = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<WarpState> warps;
Context scheduler;
int current = 0, threads = 0;
dim3 block;
const std::function<void()>* body = nullptr;
unsigned char* shared = nullptr;
int shared_bytes = 0, granted = kGrantedAlways;
std::mt19937 generator(1);
bool some_copies_at_once = false;

void enter() {
  (*body)();
  Fiber& fiber = *fibers[current];
  fiber.state = State::kDone;
  switch_to(fiber.context, scheduler);
}

void run_fiber(int index, Context& from) {
  current = index;
  switch_to(from, fibers[index]->context);
}

// Leaves the current lane where it stands, for a lane of its warp that can go on.
void leave_to_warp() {
  const int me = current, first = me / kLanes * kLanes;
  for (int i = 1; i < kLanes; ++i) {
    const int other = first + (me - first + i) % kLanes;
    if (fibers[other]->state == State::kReady) {
      run_fiber(other, fibers[me]->context);
      current = me;
      return;
    }
  }
  switch_to(fibers[me]->context, scheduler);
  current = me;
}

// All lanes of the warp meet; `bring` and `take` see the meeting, `act` is called once.
template <class Bring, class Act, class Take>
void meet(Bring bring, Act act, Take take) {
  const int me = current, lane = me % kLanes;
  WarpState& warp = warps[me / kLanes];
  Fiber& fiber = *fibers[me];
  Meeting& meeting = warp.meetings[fiber.meetings++ % 2];
  bring(meeting, lane);
  if (++warp.arrived == kLanes) {
    act(meeting);
    warp.arrived = 0;
    for (int i = 0; i < kLanes; ++i) fibers[me / kLanes * kLanes + i]->state = State::kReady;
  } else {
    fiber.state = State::kAtWarp;
    while (fiber.state == State::kAtWarp) leave_to_warp();
  }
  take(meeting, lane);
}

void check_shared(const void* pointer, int bytes) {
  const auto* first = static_cast<const unsigned char*>(pointer);
  if (first < shared || first + bytes > shared + shared_bytes) fail("address out of shared memory");
  if ((first - shared) % bytes != 0) fail("address in shared memory is not aligned");
}

void run_block() {
  fibers.reserve(static_cast<size_t>(threads));
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  warps.assign(static_cast<size_t>(threads / kLanes), WarpState{});
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.state = State::kReady;
    fiber.context.started = false;
    fiber.batches.clear();
    fiber.open.clear();
    fiber.meetings = 0;
    getcontext(&fiber.context.context);
    fiber.context.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context.context, enter, 0);
  }
  std::vector<int> order(static_cast<size_t>(threads / kLanes));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  for (;;) {
    std::shuffle(order.begin(), order.end(), generator);
    for (const int warp : order) {
      for (bool ran = true; ran;) {
        ran = false;
        for (int i = 0; i < kLanes; ++i) {
          if (fibers[warp * kLanes + i]->state != State::kReady) continue;
          run_fiber(warp * kLanes + i, scheduler);
          ran = true;
        }
      }
    }
    int done = 0;
    for (int i = 0; i < threads; ++i) {
      if (fibers[i]->state == State::kAtWarp) fail("not all lanes of a warp meet");
      done += fibers[i]->state == State::kDone;
    }
    if (done == threads) return;
    if (done != 0) fail("not all threads reach a barrier");
    for (int i = 0; i < threads; ++i) fibers[i]->state = State::kReady;
  }
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  threads = static_cast<int>(config.blockDim.x);
  const auto bytes = static_cast<int>(config.dynamicSmemBytes);
  if (threads == 0 || threads > 1024 || threads % kLanes != 0 || bytes > granted)
    return cudaErrorInvalidConfiguration;
  granted = kGrantedAlways;
  body = &kernel;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  shared_bytes = bytes;
  for (unsigned y = 0; y < gridDim.y; ++y)
    for (unsigned x = 0; x < gridDim.x; ++x) {
      block = dim3(x, y);
      // Of its own on the heap: AddressSanitizer sees what goes beyond it.
      void* memory = nullptr;
      if (posix_memalign(&memory, 128, static_cast<size_t>(bytes) + (bytes == 0)) != 0)
        fail("out of memory");
      shared = static_cast<unsigned char*>(memory);
      std::memset(shared, 0xff, static_cast<size_t>(bytes));
      run_block();
      std::free(memory);
    }
  return cudaSuccess;
}

void grant_shared_memory(int bytes) { granted = std::max(bytes, kGrantedAlways); }

dim3 thread_index() { return dim3(static_cast<unsigned>(current), 0, 0); }
dim3 block_index() { return dim3(block.x, block.y, 0); }
unsigned char* shared_memory() { return shared; }

void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("address is not aligned");
}

float float_of(uint16_t bits, bool bfloat16) {
  if (!bfloat16) {
    _Float16 value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t bits_of(float value, bool bfloat16) {
  uint16_t bits;
  if (!bfloat16) {
    const auto half = static_cast<_Float16>(value);
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
  }
  if (isnan(value)) return 0x7fff;
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  wide += 0x7fff + (wide >> 16 & 1);  // to the nearest, ties to even
  return static_cast<uint16_t>(wide >> 16);
}

void load_matrices(const void* row, int count, uint32_t* words) {
  meet([&](Meeting& m, int lane) { m.rows[lane] = row; },
       [&](Meeting& m) {
         for (int i = 0; i < 8 * count; ++i) check_shared(m.rows[i], 16);
         for (int lane = 0; lane < kLanes; ++lane)
           for (int i = 0; i < count; ++i)
             std::memcpy(&m.a[lane][i],
                         static_cast<const char*>(m.rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
       },
       [&](Meeting& m, int lane) { std::memcpy(words, m.a[lane], 4 * count); });
}

void multiply_add(const uint32_t* a, const uint32_t* b, int inner, bool bfloat16,
                  float (&sums)[4]) {
  meet(
      [&](Meeting& m, int lane) {
        std::memcpy(m.a[lane], a, static_cast<size_t>(inner));
        std::memcpy(m.b[lane], b, static_cast<size_t>(inner) / 2);
        std::memcpy(m.sums[lane], sums, sizeof sums);
      },
      [&](Meeting& m) {
        float left[16][16], right[8][16];
        const auto part = [&](uint32_t word, int i) {
          return float_of(static_cast<uint16_t>(word >> (16 * i)), bfloat16);
        };
        for (int lane = 0; lane < kLanes; ++lane)
          for (int i = 0; i < 2; ++i)
            for (int k = 0; k < inner / 8; ++k) {
              const int column = 8 * k + 2 * (lane % 4) + i;
              left[lane / 4][column] = part(m.a[lane][2 * k], i);
              left[lane / 4 + 8][column] = part(m.a[lane][2 * k + 1], i);
              right[lane / 4][column] = part(m.b[lane][k], i);
            }
        for (int lane = 0; lane < kLanes; ++lane)
          for (int i = 0; i < 4; ++i) {
            const float* row = left[lane / 4 + i / 2 * 8];
            const float* column = right[2 * (lane % 4) + i % 2];
            float sum = 0.0f;
            for (int k = 0; k < inner; ++k) sum += row[k] * column[k];
            m.sums[lane][i] += sum;
          }
      },
      [&](Meeting& m, int lane) { std::memcpy(sums, m.sums[lane], sizeof sums); });
}

void carry_out(const Copy& copy) {
  if (copy.inside) {
    std::memcpy(copy.shared, copy.source, static_cast<size_t>(copy.bytes));
  } else {
    std::memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
  }
}

void copy_async(void* destination, const void* source, int bytes, bool inside) {
  check_shared(destination, bytes);
  if (reinterpret_cast<uintptr_t>(source) % static_cast<uintptr_t>(bytes) != 0 && inside)
    fail("source of an asynchronous copy is not aligned");
  const Copy copy{destination, source, bytes, inside};
  if (some_copies_at_once && generator() % 2 == 0) {
    carry_out(copy);
  } else {
    fibers[current]->open.push_back(copy);
  }
}

void commit_copies() {
  Fiber& fiber = *fibers[current];
  fiber.batches.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_for_copies(int pending) {
  auto& batches = fibers[current]->batches;
  while (static_cast<int>(batches.size()) > pending) {
    for (const Copy& copy : batches.front()) carry_out(copy);
    batches.erase(batches.begin());
  }
}

// An H200, until set_emulated_device says otherwise.
int attributes[5] = {9, 0, 132, 227 << 10, 228 << 10};

int device_attribute(cudaDeviceAttr attribute) { return attributes[attribute]; }

}  // namespace emulation

void __syncthreads() {
  using namespace emulation;
  const int me = current;
  fibers[me]->state = State::kAtBlock;
  switch_to(fibers[me]->context, scheduler);
  current = me;
}

// What the emulated device says about itself, in the order of cudaDeviceAttr, and the seed of the
// order in which warps run and copies happen.
extern "C" __attribute__((visibility("default"))) void set_emulated_device(const int* values,
                                                                           unsigned seed) {
  for (int i = 0; i < 5; ++i) emulation::attributes[i] = values[i];
  emulation::generator.seed(seed);
  emulation::some_copies_at_once = seed != 0;
}

// Of the last launch: tells which of its kernels a launcher chose.
extern "C" __attribute__((visibility("default"))) int emulated_blocks() {
  return static_cast<int>(gridDim.x * gridDim.y);
}
