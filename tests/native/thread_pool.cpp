// The thread pool: every index once, exceptions, nesting, callers in turns, resizing, regions with phases, fork.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "engine/phases.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace {

// The stress ends early where the machine is busy.
constexpr int kSmallJobs = 100'000, kLeastJobs = 2'000;
constexpr auto kStressTime = std::chrono::seconds(10);

void every_index_once() {
  for (const int threads : {1, 2, 3, 8}) {
    pe::set_num_threads(threads);
    for (const int64_t n : {0, 1, 2, 7, 64, 1000}) {
      for (const int64_t grain : {1, 2, 7, 64, 5000}) {
        std::vector<int> seen(static_cast<size_t>(n));
        pe::parallel_for(n, grain, [&](int64_t begin, int64_t end) {
          CHECK(begin % grain == 0 && begin < end && end <= n && end - begin <= grain);
          for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
        });
        for (const int count : seen) CHECK(count == 1);
      }
    }
    bool called = false;
    pe::parallel_for(-5, 1, [&](int64_t, int64_t) { called = true; });
    CHECK(!called);
  }
}

void small_jobs() {
  pe::set_num_threads(3);
  std::vector<int64_t> sums(8);
  const auto start = std::chrono::steady_clock::now();
  int64_t job = 0;
  for (; job < kSmallJobs && (job < kLeastJobs || std::chrono::steady_clock::now() - start < kStressTime); ++job)
    pe::parallel_for(8, 1, [&](int64_t begin, int64_t) { sums[static_cast<size_t>(begin)] += job; });
  for (const int64_t sum : sums) CHECK(sum == job * (job - 1) / 2);
}

void resizing() {
  std::vector<int> values(64);
  for (int i = 0; i < 200; ++i) {
    pe::set_num_threads(1 + i * 5 % 7);
    pe::parallel_for(64, 3, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) ++values[static_cast<size_t>(k)];
    });
  }
  for (const int value : values) CHECK(value == 200);
  CHECK(throws<pe::ArgumentError>([] { pe::set_num_threads(0); }));
  CHECK(throws<pe::ArgumentError>([] { pe::set_num_threads(pe::kMaxThreads + 1); }));
}

void exceptions() {
  for (const int threads : {1, 4}) {
    pe::set_num_threads(threads);
    for (int i = 0; i < 100; ++i) {
      std::string text;
      try {
        pe::parallel_for(40, 1, [&](int64_t begin, int64_t) {
          if (begin % 10 == i % 10) throw std::runtime_error("planned");
        });
      } catch (const std::runtime_error& error) {
        text = error.what();
      }
      CHECK(text == "planned");
      std::atomic<int> count{0};
      pe::parallel_for(40, 1, [&](int64_t, int64_t) { ++count; });
      CHECK(count == 40);
      CHECK(pe::region_size() == threads);  // the pool is not left inside a body
    }
  }
}

void nesting() {
  pe::set_num_threads(4);
  std::atomic<int64_t> sum{0};
  for (int i = 0; i < 50; ++i) {
    pe::parallel_for(16, 1, [&](int64_t outer, int64_t) {
      CHECK(pe::region_size() == 1);
      pe::parallel_for(16, 1, [&](int64_t inner, int64_t) { sum += outer * inner; });
      pe::parallel_region(pe::region_size(), [&](int worker) { CHECK(worker == 0); });
    });
  }
  CHECK(sum == 50 * 120 * 120);
}

void callers_in_turns() {
  pe::set_num_threads(3);
  std::vector<std::thread> callers;
  std::vector<int64_t> sums(6);
  for (size_t caller = 0; caller < sums.size(); ++caller)
    callers.emplace_back([&sums, caller] {
      for (int i = 0; i < 100; ++i) {
        if (i % 20 == 0) pe::set_num_threads(2 + static_cast<int>(caller) % 3);
        std::vector<int64_t> parts(10);
        pe::parallel_for(10, 1, [&](int64_t begin, int64_t) { parts[static_cast<size_t>(begin)] = begin; });
        sums[caller] += std::accumulate(parts.begin(), parts.end(), int64_t{0});
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (const int64_t sum : sums) CHECK(sum == 100 * 45);
}

// Each phase reads what the one before wrote under other items: a phase that begins before the last has ended is a data
// race and a wrong value. Workers leave and come late at random.
void phases() {
  for (const int threads : {1, 2, 3, 5}) {
    pe::set_num_threads(threads);
    const int num_workers = pe::region_size();
    constexpr size_t kItems = 13;
    constexpr int kPhases = 200;
    std::vector<int64_t> now(kItems), next(kItems);
    for (int round = 0; round < 20; ++round) {
      std::fill(now.begin(), now.end(), 1);
      pe::Phases shared(num_workers);
      std::vector<std::atomic<int>> calls(static_cast<size_t>(num_workers));
      pe::parallel_region(num_workers, [&](int index) {
        ++calls[static_cast<size_t>(index)];
        pe::Phases::Worker worker(shared, index);
        for (int phase = 0; phase < kPhases; ++phase) {
          if (index > 0 && phase % 50 == index) std::this_thread::sleep_for(std::chrono::microseconds(200));
          worker.run(0, 1, [](int64_t, int64_t) { CHECK(false); });
          worker.run(kItems, 1 + phase % 4, [&](int64_t begin, int64_t end) {
            for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i)
              next[i] = (now[i] + now[(i + 1) % kItems] + phase) % 1'000'003;
          });
          worker.run(kItems, 5,
                     [&](int64_t begin, int64_t end) { std::copy(&next[begin], &next[0] + end, &now[begin]); });
        }
      });
      CHECK(calls[0] == 1);
      for (const std::atomic<int>& count : calls) CHECK(count <= 1);
      int64_t expected = 1;
      for (int phase = 0; phase < kPhases; ++phase) expected = (2 * expected + phase) % 1'000'003;
      for (const int64_t value : now) CHECK(value == expected);
    }
  }
}

// A worker begins at its own range and goes on with those of workers that do not come.
void ranges() {
  pe::Phases shared(3);
  pe::Phases::Worker worker(shared, 1);
  std::vector<int64_t> order;
  worker.run(30, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) order.push_back(i);
  });
  std::vector<int64_t> expected(30);
  for (size_t i = 0; i < 30; ++i) expected[i] = static_cast<int64_t>((i + 10) % 30);
  CHECK(order == expected);
}

// All workers come where there is work enough.
void everybody_comes() {
  pe::set_num_threads(3);
  std::vector<std::atomic<int>> seen(3);
  const auto start = std::chrono::steady_clock::now();
  pe::parallel_region(pe::region_size(), [&](int worker) {
    ++seen[static_cast<size_t>(worker)];
    const auto all_came = [&] { return seen[0] + seen[1] + seen[2] == 3; };
    while (!all_came() && std::chrono::steady_clock::now() - start < kStressTime)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  for (const std::atomic<int>& count : seen) CHECK(count == 1);
}

// Regions and loops in any order, as a decoder that serves while another thread trains.
void mixed() {
  pe::set_num_threads(3);
  std::thread other([] {
    for (int i = 0; i < 100; ++i) {
      std::atomic<int> count{0};
      pe::parallel_for(30, 2, [&](int64_t begin, int64_t end) { count += static_cast<int>(end - begin); });
      CHECK(count == 30);
    }
  });
  for (int i = 0; i < 100; ++i) {
    const int num_workers = pe::region_size();
    pe::Phases shared(num_workers);
    std::vector<int> seen(40);
    pe::parallel_region(num_workers, [&](int index) {
      pe::Phases::Worker worker(shared, index);
      worker.run(40, 1, [&](int64_t begin, int64_t) { seen[static_cast<size_t>(begin)] = 1; });
      CHECK(std::accumulate(seen.begin(), seen.end(), 0) == 40);
    });
  }
  other.join();
}

void forks() {
  pe::set_num_threads(3);
  for (int i = 0; i < 20; ++i) {
    std::vector<int> values(50);
    const auto fill = [&] {
      pe::parallel_for(50, 1, [&](int64_t begin, int64_t) { values[static_cast<size_t>(begin)] = 1; });
    };
    fill();
    const pid_t child = fork();
    if (child == 0) {
      std::fill(values.begin(), values.end(), 0);
      fill();
      _exit(std::accumulate(values.begin(), values.end(), 0) == 50 ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    CHECK(status == 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  every_index_once();
  small_jobs();
  resizing();
  exceptions();
  nesting();
  callers_in_turns();
  phases();
  ranges();
  everybody_comes();
  mixed();
  // ThreadSanitizer does not follow threads that a child of a process with threads starts.
  if (argc > 1 && std::string(argv[1]) == "fork") forks();
  return g_failures != 0;
}
