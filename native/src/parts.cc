#include "parts.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace lorac {
namespace {

constexpr std::chrono::microseconds kSpin{100};  // the swap of a model makes a call for each weight, one after another

// Tells the processor that a loop waits.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether it came true within a time that is worth more than sleep.
template <typename Condition>
bool WaitBusily(const Condition& is_true) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  while (!is_true()) {
    if (std::chrono::steady_clock::now() > end) return false;
    Pause();
  }
  return true;
}

class Pool {
 public:
  // Calls work(i) for every i below `parts`; where another call is at work here, on this thread alone.
  void Run(int64_t parts, int64_t threads, const std::function<void(int64_t)>& work) {
    std::unique_lock<std::mutex> only(callers_, std::try_to_lock);
    if (!only.owns_lock()) {
      for (int64_t i = 0; i < parts; ++i) work(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; started_ < threads - 1; ++started_) std::thread([this] { Serve(); }).detach();
      work_ = &work;
      parts_ = parts;
      wanted_ = threads - 1;
      next_ = 0;
      ++call_;
      if (asleep_ > 0) wake_.notify_all();
    }
    TakeParts(work, parts);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = nullptr;  // nobody begins any more
    }
    if (WaitBusily([this] { return busy_ == 0; })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void TakeParts(const std::function<void(int64_t)>& work, int64_t parts) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < parts;) work(i);
  }

  void Serve() {
    for (uint64_t seen = 0;;) {
      WaitForCall(seen);
      std::unique_lock<std::mutex> lock(mutex_);
      seen = call_;
      if (work_ == nullptr || busy_ >= wanted_) continue;
      ++busy_;
      const std::function<void(int64_t)>& work = *work_;
      const int64_t parts = parts_;
      lock.unlock();
      TakeParts(work, parts);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void WaitForCall(uint64_t seen) {
    if (WaitBusily([&] { return call_ != seen; })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    ++asleep_;
    wake_.wait(lock, [&] { return call_ != seen; });
    --asleep_;
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> call_{0};
  std::atomic<int64_t> next_{0}, busy_{0};
  const std::function<void(int64_t)>* work_ = nullptr;
  int64_t parts_ = 0, wanted_ = 0, started_ = 0, asleep_ = 0;
};

std::atomic<Pool*> pool{nullptr};

// A process begins without a pool; so does a forked child, which has none of its parent's threads.
Pool& FindPool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });
  static_cast<void>(registered);
  Pool* found = pool;
  if (found == nullptr) {
    Pool* made = new Pool;  // never deleted: its threads end with the process
    if (pool.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

}  // namespace

void RunParts(int64_t parts, int64_t threads, const std::function<void(int64_t)>& work) {
  if (parts < 2 || threads < 2) {
    for (int64_t i = 0; i < parts; ++i) work(i);
    return;
  }
  FindPool().Run(parts, threads, work);
}

}  // namespace lorac
