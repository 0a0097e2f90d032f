// The requests that wait, in a policy's order and by age: see aseer/waiting.py.
#pragma once

#include <array>
#include <cstdint>
#include <list>
#include <set>
#include <vector>

#include "pykey.h"

namespace aseer {

// Groups passed over in a round until it ends.
inline constexpr int kMaxPassed = 2;

class WaitingQueue {
 public:
  // Lowest `rank(request, length estimate of its group)` first; siblings among each
  // other as if their estimate were 0. No two requests rank the same.
  explicit WaitingQueue(nb::callable rank) : rank_(std::move(rank)) {}

  size_t Size() const { return requests_.size(); }
  bool Contains(nb::handle request_id) const { return requests_.contains(request_id); }
  int NumPassed() const { return num_passed_; }

  void Add(const nb::tuple& waiting, int64_t length_estimate);
  void SetLengthEstimate(nb::handle group_id, int64_t length_estimate);
  void SetRank(nb::callable rank);
  int64_t LengthEstimate(nb::handle group_id) const;
  void Remove(const nb::tuple& waiting);
  void RemoveGroup(nb::handle group_id);
  nb::object Oldest() const;
  nb::list Head(size_t num_groups) const;

  void BeginRound();
  nb::object First(int64_t room);
  void PassOver(int64_t needs);

 private:
  using Rank = std::array<int64_t, 4>;
  struct Group;
  struct Request {
    nb::tuple waiting;
    Group* group;
    Rank rank;  // among its siblings
    std::list<Request*>::iterator age;
  };
  struct Before {
    bool operator()(const Group* a, const Group* b) const;
  };
  using Ranked = std::set<Group*, Before>;
  struct Group {
    nb::object id;
    uint64_t number = 0;            // in the order of coming
    std::vector<Request*> members;  // the first of them last
    int64_t length_estimate = -1;
    Rank rank{};          // its first member's
    int64_t needs = 0;    // tokens the first member needs room for, if it did not fit
    uint64_t passed = 0;  // the last round that passed it over
    Ranked::iterator at;
    bool is_ranked = false;
  };

  Rank RankOf(const nb::tuple& waiting, int64_t length_estimate) const;
  // Its first member or its estimate changed.
  void Rerank(Group& group);
  void Drop(Group& group);

  nb::callable rank_;
  PyMap<Request> requests_;
  PyMap<Group> groups_;
  std::list<Request*> by_age_;  // the oldest first
  Ranked ranked_;
  Group* first_ = nullptr;  // what `First` gave
  uint64_t num_groups_ = 0;
  uint64_t round_ = 0;
  int num_passed_ = 0;  // in this round
};

}  // namespace aseer
