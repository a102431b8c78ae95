// What the stand-alone drivers of the attention op share: a case as a line of key=value words, errors against float64, the loop
// over stdin. Included by tests/cpu_op/tree_attention_driver.cpp and tests/cuda_sim/driver.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <iostream>
#include <limits>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace drivers {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Case {
  std::map<std::string, std::string> text;
  explicit Case(const std::string& line) {
    std::istringstream words(line);
    for (std::string word; words >> word;) {
      const size_t equals = word.find('=');
      if (equals == std::string::npos) throw std::invalid_argument("not key=value: " + word);
      text[word.substr(0, equals)] = word.substr(equals + 1);
    }
  }
  // Without `otherwise`, a key that is missing throws.
  const std::string& string(const char* key) const { return text.at(key); }
  std::string string(const char* key, const char* otherwise) const { return text.count(key) ? text.at(key) : otherwise; }
  int integer(const char* key) const { return std::stoi(text.at(key)); }
  double number(const char* key, double otherwise) const { return text.count(key) ? std::stod(text.at(key)) : otherwise; }
  std::vector<int32_t> list(const char* key) const { return numbers(string(key)); }
  std::vector<int32_t> list(const char* key, const char* otherwise) const { return numbers(string(key, otherwise)); }

 private:
  static std::vector<int32_t> numbers(const std::string& words) {
    std::vector<int32_t> found;
    std::istringstream items(words);
    for (std::string item; std::getline(items, item, ',');) found.push_back(std::stoi(item));
    return found;
  }
};

struct Errors {
  double squares = 0, norm = 0, lse = 0;
  void add(double got, double expected) {
    squares += (got - expected) * (got - expected);
    norm += expected * expected;
  }
  double relative() const { return norm > 0 ? std::sqrt(squares / norm) : std::sqrt(squares); }

  // One node and head, the slow way: the scores of its keys [dim] each, their softmax, the mean of their values. `keys` and
  // `values` give the k-th of `count`, `output` the result of column d; lse: the result of the row, or null.
  template <class Keys, class Values, class Output>
  void add_row(int dim, double scale, double softcap, const double* query, size_t count, const Keys& keys, const Values& values,
               const Output& output, const float* lse_of_row) {
    std::vector<double> scores, expected(dim);
    double largest = -kInfinity, sum = 0;
    for (size_t k = 0; k < count; ++k) {
      const double* key = keys(k);
      double s = 0;
      for (int d = 0; d < dim; ++d) s += query[d] * key[d];
      s *= scale;
      scores.push_back(softcap > 0 ? softcap * std::tanh(s / softcap) : s);
      largest = std::max(largest, scores.back());
    }
    for (size_t k = 0; k < count; ++k) {
      const double weight = std::exp(scores[k] - largest), *value = values(k);
      sum += weight;
      for (int d = 0; d < dim; ++d) expected[d] += weight * value[d];
    }
    for (int d = 0; d < dim; ++d) {
      const double got = output(d);
      add(got, count == 0 ? 0 : expected[d] / sum);
      if (count == 0 && got != 0) squares = kInfinity;
    }
    if (lse_of_row == nullptr) return;
    const double got = *lse_of_row;
    const double difference = count == 0 ? (got == -kInfinity ? 0 : kInfinity) : std::fabs(got - largest - std::log(sum));
    lse = difference <= lse ? lse : difference;  // NaN stays
  }
};

// Runs every case of stdin: 0 if all are right, 1 if one is not, 2 if one cannot be run.
template <class Run>
int run_cases(const Run& run) {
  bool good = true;
  try {
    for (std::string line; std::getline(std::cin, line);) good &= run(line);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "driver: %s\n", error.what());
    return 2;
  }
  return good ? 0 : 1;
}

}  // namespace drivers
