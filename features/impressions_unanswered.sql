-- Impressions that count: the window has closed against the watermark, and nothing the user did with that
-- item falls into it. The window closes by arrival (all that could tell has then landed); what falls into it
-- goes by when it occurred, so a click that arrives late still answers.
create or replace temp table unanswered as
with closed as (
    select u, i, n, occurred_at
    from events
    where impression and level is not null and arrived_at + to_microseconds($window_us) <= $watermark::timestamptz
),
taken_up as (select distinct u, i from events where answers),
contested as (
    select u, i, n, occurred_at, answers
    from events
    semi join taken_up using (u, i)
    where answers or impression
),
answered_next as (
    select
        u, n, occurred_at,
        min(occurred_at) filter (answers) over (
            partition by u, i order by occurred_at range between current row and unbounded following
        ) as next_answer
    from contested
)
select u, n from closed anti join taken_up using (u, i)
union all
select u, n
from closed
join answered_next using (u, n)
where answered_next.next_answer is null
    or answered_next.next_answer > closed.occurred_at + to_microseconds($window_us)
