#!lua flags=allow-oom
-- Let go of a photo, and keep, publish and list what came of it: in one step, and once.
-- It works when Redis is full too; the next command makes room again.
local id, json, jpeg, keep_seconds = unpack(ARGV)
local photo, image = 'faces:photo:' .. id, 'faces:image:' .. id
if redis.call('ZREM', 'faces:jobs', id) == 0 then return end
redis.call('DECRBY', 'faces:bytes', redis.call('HSTRLEN', photo, 'photo'))
redis.call('DEL', photo)
redis.call('HSET', image, 'json', json, 'jpeg', jpeg)
redis.call('EXPIRE', image, keep_seconds)
redis.call('XADD', 'faces:news', 'MAXLEN', '~', 1000, '*', 'id', id, 'json', json)
if jpeg ~= '' then
  redis.call('LPUSH', 'faces:newest', id)
  redis.call('LTRIM', 'faces:newest', 0, 99)
end
