// The requests that wait, in one or two orders and by age: see aseer/core/waiting.py.
//
// Ranks come with the requests, so nothing here calls back: a request brings, for each
// order, its rank among its siblings and the rank its group has while it is the first
// of them. Every order is kept up to date, and `Choose` says which one is read.
#pragma once

#include <array>
#include <cstdint>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "slots.h"

namespace aseer {

// Groups passed over in a round until it ends.
inline constexpr int kMaxPassed = 2;
inline constexpr size_t kMaxOrders = 2;

using Rank = std::array<int64_t, 4>;

class WaitingOrders {
 public:
  struct Ranks {
    Rank own{};   // among its siblings, lowest first
    Rank lead{};  // its group's while it is the first of them
  };
  using AllRanks = std::array<Ranks, kMaxOrders>;  // by order; the rest is not read

  explicit WaitingOrders(size_t num_orders);

  size_t Size() const { return requests_.Size(); }
  size_t NumGroups() const { return groups_.Size(); }
  int NumPassed() const { return num_passed_; }

  // Returns the request's handle and its group's. Group -1: one that has no request.
  std::pair<Handle, Handle> Add(Handle group, const AllRanks& ranks);
  // Members of a group have other ranks in it now; those not named keep theirs.
  void SetLeads(Handle group,
                std::span<const std::pair<Handle, std::array<Rank, kMaxOrders>>> leads);
  // Returns whether its group's handle is closed, too: it was the last.
  bool Remove(Handle request);
  std::vector<Handle> Members(Handle group) const;
  void RemoveGroup(Handle group);

  void Choose(size_t order);
  Handle Oldest() const { return oldest_; }  // -1: none waits
  std::vector<Handle> Head(size_t num_groups) const;

  void BeginRound();
  Handle First(int64_t room);  // -1: none
  void PassOver(int64_t needs);

 private:
  struct Key {
    Rank rank{};
    uint64_t number = 0;  // of the group, in the order of coming
    Handle group = -1;
    bool operator<(const Key& other) const {
      return rank != other.rank ? rank < other.rank : number < other.number;
    }
  };
  using Ranked = std::set<Key>;
  struct Request {
    Handle group = -1;
    Handle older = -1;
    Handle newer = -1;
    AllRanks ranks;
  };
  // A group's place in one order.
  struct Place {
    std::vector<Handle> members;  // the first of them last
    Ranked::iterator at;
    int64_t needs = 0;    // tokens the first member needs room for, if it did not fit
    uint64_t passed = 0;  // the last round that passed it over
  };
  struct Group {
    uint64_t number = 0;
    std::array<Place, kMaxOrders> places;
  };

  // Its first member or that one's rank changed.
  void Rerank(size_t order, Handle group);
  void Unlink(const Request& request);

  size_t num_orders_;
  size_t chosen_ = 0;
  Slots<Request> requests_;
  Slots<Group> groups_;
  std::array<Ranked, kMaxOrders> ranked_;
  Handle oldest_ = -1;
  Handle newest_ = -1;
  Handle first_ = -1;  // the group of which `First` gave a request
  uint64_t num_groups_ = 0;
  uint64_t round_ = 0;
  int num_passed_ = 0;  // in this round
};

}  // namespace aseer
