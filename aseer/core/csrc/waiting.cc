#include "waiting.h"

#include <algorithm>

namespace aseer {

WaitingOrders::WaitingOrders(size_t num_orders) : num_orders_(num_orders) {
  Require(num_orders >= 1 && num_orders <= kMaxOrders, "there are one or two orders");
}

std::pair<Handle, Handle> WaitingOrders::Add(Handle group, const AllRanks& ranks) {
  const bool is_new = group < 0;
  Require(is_new || groups_.IsOpen(group), "no request of that group waits");
  if (is_new) group = groups_.Open(Group{.number = ++num_groups_, .places = {}});
  const Handle added =
      requests_.Open({.group = group, .older = newest_, .newer = -1, .ranks = ranks});
  (newest_ < 0 ? oldest_ : requests_[newest_].newer) = added;
  newest_ = added;
  for (size_t order = 0; order < num_orders_; ++order) {
    Place& place = groups_[group].places[order];
    const auto at = std::ranges::lower_bound(
        place.members, ranks[order].own, std::ranges::greater{},
        [&](Handle member) -> const Rank& {
          return requests_[member].ranks[order].own;
        });
    place.members.insert(at, added);
    if (is_new) {
      const Key key{ranks[order].lead, groups_[group].number, group};
      place.at = ranked_[order].insert(key).first;
    } else if (place.members.back() == added) {
      Rerank(order, group);
    }
  }
  return {added, group};
}

void WaitingOrders::SetLeads(
    Handle group,
    std::span<const std::pair<Handle, std::array<Rank, kMaxOrders>>> leads) {
  Require(groups_.IsOpen(group), "no request of that group waits");
  for (const auto& [request, ranks] : leads) {
    Require(requests_.IsOpen(request) && requests_[request].group == group,
            "the request does not wait in that group");
  }
  for (size_t order = 0; order < num_orders_; ++order) {
    for (const auto& [request, ranks] : leads) {
      requests_[request].ranks[order].lead = ranks[order];
    }
    Rerank(order, group);
  }
}

bool WaitingOrders::Remove(Handle request) {
  Require(requests_.IsOpen(request), "the request does not wait");
  const Handle group = requests_[request].group;
  if (groups_[group].places[0].members.size() == 1) {
    RemoveGroup(group);
    return true;
  }
  for (size_t order = 0; order < num_orders_; ++order) {
    std::vector<Handle>& members = groups_[group].places[order].members;
    const bool was_first = members.back() == request;
    std::erase(members, request);
    if (was_first) Rerank(order, group);
  }
  Unlink(requests_[request]);
  requests_.Close(request);
  return false;
}

std::vector<Handle> WaitingOrders::Members(Handle group) const {
  Require(groups_.IsOpen(group), "no request of that group waits");
  return groups_[group].places[0].members;
}

void WaitingOrders::RemoveGroup(Handle group) {
  Require(groups_.IsOpen(group), "no request of that group waits");
  for (const Handle member : groups_[group].places[0].members) {
    Unlink(requests_[member]);
    requests_.Close(member);
  }
  for (size_t order = 0; order < num_orders_; ++order) {
    ranked_[order].erase(groups_[group].places[order].at);
  }
  if (first_ == group) first_ = -1;
  groups_.Close(group);
}

void WaitingOrders::Choose(size_t order) {
  Require(order < num_orders_, "there is no such order");
  chosen_ = order;
  first_ = -1;
}

std::vector<Handle> WaitingOrders::Head(size_t num_groups) const {
  std::vector<Handle> head;
  for (const Key& key : ranked_[chosen_]) {
    if (head.size() == num_groups) break;
    head.push_back(groups_[key.group].places[chosen_].members.back());
  }
  return head;
}

void WaitingOrders::BeginRound() {
  ++round_;
  num_passed_ = 0;
  first_ = -1;
}

Handle WaitingOrders::First(int64_t room) {
  for (const Key& key : ranked_[chosen_]) {
    if (num_passed_ >= kMaxPassed) break;
    Place& place = groups_[key.group].places[chosen_];
    if (place.passed == round_) continue;
    if (place.needs <= room) {
      first_ = key.group;
      return place.members.back();
    }
    place.passed = round_;
    ++num_passed_;
  }
  return -1;
}

void WaitingOrders::PassOver(int64_t needs) {
  Require(first_ >= 0, "no request was given that could be passed over");
  Place& place = groups_[first_].places[chosen_];
  place.needs = needs;
  place.passed = round_;
  first_ = -1;
  ++num_passed_;
}

void WaitingOrders::Rerank(size_t order, Handle group) {
  Place& place = groups_[group].places[order];
  place.needs = 0;
  const Rank& rank = requests_[place.members.back()].ranks[order].lead;
  if (rank == place.at->rank) return;
  auto node = ranked_[order].extract(place.at);
  node.value().rank = rank;
  place.at = ranked_[order].insert(std::move(node)).position;
}

void WaitingOrders::Unlink(const Request& request) {
  (request.older < 0 ? oldest_ : requests_[request.older].newer) = request.newer;
  (request.newer < 0 ? newest_ : requests_[request.newer].older) = request.older;
}

}  // namespace aseer
