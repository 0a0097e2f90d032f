#include "waiting.h"

#include <algorithm>
#include <stdexcept>

namespace aseer {
namespace {

// Where a `Waiting` has them.
nb::handle RequestId(const nb::tuple& waiting) {
  return PyTuple_GET_ITEM(waiting.ptr(), 0);
}
nb::handle GroupId(const nb::tuple& waiting) {
  return PyTuple_GET_ITEM(waiting.ptr(), 1);
}

}  // namespace

bool WaitingQueue::Before::operator()(const Group* a, const Group* b) const {
  return a->rank != b->rank ? a->rank < b->rank : a->number < b->number;
}

WaitingQueue::Rank WaitingQueue::RankOf(const nb::tuple& waiting,
                                        int64_t length_estimate) const {
  const auto numbers = nb::cast<nb::tuple>(rank_(waiting, length_estimate));
  Rank rank{};
  if (numbers.size() > rank.size())
    throw nb::value_error("a rank has at most 4 numbers");
  for (size_t i = 0; i < numbers.size(); ++i) rank[i] = nb::cast<int64_t>(numbers[i]);
  return rank;
}

void WaitingQueue::Add(const nb::tuple& waiting, int64_t length_estimate) {
  const nb::handle id = RequestId(waiting);
  if (requests_.contains(id)) {
    const nb::str message = nb::str("request {!r} waits already").format(id);
    throw nb::value_error(message.c_str());
  }
  const Rank rank = RankOf(waiting, 0);
  const nb::handle group_id = GroupId(waiting);
  auto [found, is_new] = groups_.try_emplace(group_id);
  Group& group = found->second;
  if (is_new) {
    group.id = nb::borrow(group_id);
    group.number = ++num_groups_;
  }
  Request& request = requests_[id];
  by_age_.push_back(&request);
  request = {waiting, &group, rank, std::prev(by_age_.end())};
  const auto at = std::lower_bound(
      group.members.begin(), group.members.end(), &request,
      [](const Request* a, const Request* b) { return a->rank > b->rank; });
  group.members.insert(at, &request);
  const bool changed = group.length_estimate != length_estimate;
  group.length_estimate = length_estimate;
  if (changed || group.members.back() == &request) Rerank(group);
}

void WaitingQueue::SetLengthEstimate(nb::handle group_id, int64_t length_estimate) {
  const auto found = groups_.find(group_id);
  if (found == groups_.end()) return;
  found->second.length_estimate = length_estimate;
  Rerank(found->second);
}

void WaitingQueue::SetRank(nb::callable rank) {
  rank_ = std::move(rank);
  ranked_.clear();
  for (auto& [id, request] : requests_) request.rank = RankOf(request.waiting, 0);
  for (auto& [id, group] : groups_) {
    std::ranges::sort(group.members, std::ranges::greater{}, &Request::rank);
    group.is_ranked = false;
    Rerank(group);
  }
}

int64_t WaitingQueue::LengthEstimate(nb::handle group_id) const {
  const auto found = groups_.find(group_id);
  if (found == groups_.end()) throw nb::key_error("no request of the group waits");
  return found->second.length_estimate;
}

void WaitingQueue::Remove(const nb::tuple& waiting) {
  const auto found = requests_.find(RequestId(waiting));
  if (found == requests_.end()) throw nb::key_error("the request does not wait");
  Request& request = found->second;
  Group& group = *request.group;
  const bool was_first = group.members.back() == &request;
  std::erase(group.members, &request);
  by_age_.erase(request.age);
  requests_.erase(found);
  if (group.members.empty()) {
    Drop(group);
  } else if (was_first) {
    Rerank(group);
  }
}

void WaitingQueue::RemoveGroup(nb::handle group_id) {
  const auto found = groups_.find(group_id);
  if (found == groups_.end()) return;
  for (const Request* request : found->second.members) {
    by_age_.erase(request->age);
    requests_.erase(requests_.find(RequestId(request->waiting)));
  }
  Drop(found->second);
}

nb::object WaitingQueue::Oldest() const {
  return by_age_.empty() ? nb::none() : nb::object(by_age_.front()->waiting);
}

nb::list WaitingQueue::Head(size_t num_groups) const {
  nb::list head;
  for (const Group* group : ranked_) {
    if (head.size() == num_groups) break;
    head.append(group->members.back()->waiting);
  }
  return head;
}

void WaitingQueue::BeginRound() {
  ++round_;
  num_passed_ = 0;
  first_ = nullptr;
}

nb::object WaitingQueue::First(int64_t room) {
  for (auto at = ranked_.begin(); at != ranked_.end() && num_passed_ < kMaxPassed;
       ++at) {
    Group& group = **at;
    if (group.passed == round_) continue;
    if (group.needs <= room) {
      first_ = &group;
      return group.members.back()->waiting;
    }
    group.passed = round_;
    ++num_passed_;
  }
  return nb::none();
}

void WaitingQueue::PassOver(int64_t needs) {
  if (first_ == nullptr) throw std::logic_error("nothing was given");
  first_->needs = needs;
  first_->passed = round_;
  first_ = nullptr;
  ++num_passed_;
}

void WaitingQueue::Rerank(Group& group) {
  const Rank rank = RankOf(group.members.back()->waiting, group.length_estimate);
  group.needs = 0;
  if (!group.is_ranked) {
    group.rank = rank;
    group.at = ranked_.insert(&group).first;
    group.is_ranked = true;
  } else if (rank != group.rank) {
    auto node = ranked_.extract(group.at);
    group.rank = rank;
    group.at = ranked_.insert(std::move(node)).position;
  }
}

void WaitingQueue::Drop(Group& group) {
  if (group.is_ranked) ranked_.erase(group.at);
  if (first_ == &group) first_ = nullptr;
  const nb::object id = std::move(group.id);  // lives until its entry is gone
  groups_.erase(id);
}

}  // namespace aseer
