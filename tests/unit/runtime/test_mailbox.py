"""From one thread to another: nothing is lost, nobody waits for what cannot come."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aseer.runtime.mailbox import Mailbox, MailboxClosed


async def test_items_come_in_order_and_then_the_end():
    mailbox = Mailbox()
    thread = threading.Thread(
        target=lambda: [*map(mailbox.put, range(1000)), mailbox.close()]
    )
    thread.start()
    assert [await mailbox.get() for _ in range(1000)] == list(range(1000))
    with pytest.raises(MailboxClosed):
        await mailbox.get()
    thread.join()


async def test_why_it_was_closed_is_told_after_the_items_before_it():
    mailbox = Mailbox()
    mailbox.put(1)
    mailbox.close(KeyError("x"))
    mailbox.close()
    assert await mailbox.get() == 1
    with pytest.raises(MailboxClosed):
        await mailbox.get()
    assert isinstance(mailbox.error, KeyError)


async def test_a_reader_that_gave_up_is_known_until_somebody_reads_again():
    mailbox = Mailbox()
    task = asyncio.current_task()
    mailbox.give_up(task)
    assert mailbox.was_given_up_by(task)
    assert not mailbox.was_given_up_by(None)
    mailbox.put(1)
    assert await mailbox.get() == 1
    assert not mailbox.was_given_up_by(task)


async def test_while_another_reads_nobody_has_given_up_or_holds_anything_up():
    mailbox = Mailbox()
    mailbox.needs_reader = lambda: True
    task = asyncio.current_task()
    mailbox.put(0)
    await mailbox.get()
    assert mailbox.is_held_up_by(task)
    assert not mailbox.is_held_up_by(None)
    other = asyncio.get_running_loop().create_task(mailbox.get())
    await asyncio.sleep(0)
    mailbox.give_up(task)
    assert not mailbox.was_given_up_by(task)
    assert not mailbox.is_held_up_by(task)
    mailbox.put(1)
    assert await other == 1
    assert not mailbox.is_held_up_by(task), "it is the other who has to read on"
    assert mailbox.was_given_up_by(task)


async def test_a_cancelled_wait_loses_no_item():
    mailbox = Mailbox()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await mailbox.get()
    mailbox.put(7)
    assert await mailbox.get() == 7


def test_a_plain_thread_waits_too():
    mailbox = Mailbox()
    threading.Timer(0.01, mailbox.put, args=[3]).start()
    assert mailbox.get_blocking() == 3
    threading.Timer(0.01, mailbox.close).start()
    with pytest.raises(MailboxClosed):
        mailbox.get_blocking()


async def test_waits_that_are_broken_off_leave_nothing_behind():
    mailbox = Mailbox()
    for _ in range(100):
        waiting = asyncio.get_running_loop().create_task(mailbox.get())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    assert not mailbox._waiters
    mailbox.put(1)
    assert await mailbox.get() == 1


async def test_a_wait_that_is_broken_off_as_an_item_comes_leaves_it_to_the_next():
    mailbox = Mailbox()
    waiting = asyncio.get_running_loop().create_task(mailbox.get())
    await asyncio.sleep(0)
    mailbox.put(1)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert await mailbox.get() == 1


async def test_each_item_goes_to_one_of_those_that_wait():
    mailbox = Mailbox()
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(mailbox.get()) for _ in range(3)]
        await asyncio.sleep(0)
        for item in range(3):
            mailbox.put(item)
    assert sorted(task.result() for task in waiting) == [0, 1, 2]


async def test_the_end_wakes_all_that_wait():
    mailbox = Mailbox()
    loop = asyncio.get_running_loop()
    waiting = [loop.create_task(mailbox.get()) for _ in range(3)]
    await asyncio.sleep(0)
    mailbox.close()
    await asyncio.wait(waiting)
    assert all(isinstance(task.exception(), MailboxClosed) for task in waiting)


async def test_whose_loop_is_gone_is_no_hindrance_to_others():
    mailbox = Mailbox()

    def wait_elsewhere():
        loop = asyncio.new_event_loop()
        waiting = loop.create_task(mailbox.get())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        waiting._log_destroy_pending = False
        return waiting

    gone = await asyncio.to_thread(wait_elsewhere)
    waiting = asyncio.get_running_loop().create_task(mailbox.get())
    await asyncio.sleep(0)
    mailbox.put(1)
    assert await waiting == 1
    assert not gone.done()
    gone.get_coro().close()


async def test_loops_in_several_threads_read_from_one_mailbox():
    mailbox = Mailbox()

    async def read_all():
        items = []
        while True:
            try:
                items.append(await mailbox.get())
            except MailboxClosed:
                return items

    reading = [asyncio.to_thread(asyncio.run, read_all()) for _ in range(2)]
    async with asyncio.TaskGroup() as tasks:
        read = [tasks.create_task(each) for each in reading]
        read.append(tasks.create_task(read_all()))
        for item in range(300):
            mailbox.put(item)
            if item % 10 == 0:
                await asyncio.sleep(0)
        mailbox.close()
    assert sorted(i for task in read for i in task.result()) == list(range(300))
