// A test is a function that throws or returns; a test program is `int main() { return run({...}); }` under CTest.
#pragma once

#include <cstdio>
#include <exception>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace worldenv::test {

struct Test {
  const char* name;
  std::function<void()> body;
};

inline void require(bool holds, const char* what, const char* file, int line) {
  if (!holds) throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": not so: " + what);
}

// Runs every test, says which failed and why, and gives their number as the exit code.
inline int run(std::initializer_list<Test> tests) {
  int failed = 0;
  for (const Test& test : tests) {
    try {
      test.body();
      std::printf("ok      %s\n", test.name);
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED  %s: %s\n", test.name, error.what());
    }
  }
  return failed;
}

}  // namespace worldenv::test

#define REQUIRE(...) ::worldenv::test::require((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
