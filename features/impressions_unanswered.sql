-- Impressions that count: the window has closed against the watermark, and nothing the user did with that
-- item falls into it. The window closes by arrival (all that could tell has then landed); what falls into it
-- goes by when it occurred, so a click that arrives late still answers.
create or replace temp table unanswered as
with closed as (
    select u, i, n, occurred_at
    from events
    where impression and level is not null and arrived_at + to_microseconds($window_us) <= $watermark::timestamptz
),
answers as (select distinct u, i, occurred_at from events where answers)
select closed.u, closed.n
from closed
-- the next answer: one at the impression's own time is in the window too
asof left join answers
    on answers.u = closed.u and answers.i = closed.i and answers.occurred_at >= closed.occurred_at
where answers.occurred_at is null
    or answers.occurred_at > closed.occurred_at + to_microseconds($window_us)
