-- One shard's rows of the finished stage, with weights above 0 whose mean over the stage is 1 (to nine decimals:
-- a last bit of pow() must not change a dataset's id).
select
    drafted.* exclude (recency, inverse_propensity),
    greatest(
        round(coalesce(recency, 1) * coalesce(inverse_propensity / figures.inverse_mean, 1) / figures.mean, 9), 1e-9
    ) as weight
from read_parquet($draft) as drafted, figures
where preferred > 0 or -preferred <= figures.last_draw
order by user_id, chosen
