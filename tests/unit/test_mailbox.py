"""From one thread to another: nothing is lost, nobody waits for what cannot come."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aseer.mailbox import Mailbox, MailboxClosed


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
