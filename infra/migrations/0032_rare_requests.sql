-- The list of requests by what is rare: failures, and what no champion answered. Most requests are in neither index.
create index request_event_failed on request_event (at, id) where status >= 400;
create index request_event_aside on request_event (at, id) where slot <> 'champion';

-- And by what people said of them.
create index feedback_of_requests on feedback (request_at, request_id);
create index feedback_telling on feedback (request_at, request_id) where score < 0 or correction is not null;
