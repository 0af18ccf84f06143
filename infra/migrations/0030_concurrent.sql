-- How many requests a key or a model may have under way, at each gateway.
alter table allowance drop constraint allowance_kind_check;
alter table allowance add constraint allowance_kind_check
    check (kind in ('requests', 'tokens', 'usd', 'usd_month', 'concurrent'));
