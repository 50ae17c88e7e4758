package kafka

import (
	"github.com/segmentio/kafka-go/protocol"
	"github.com/segmentio/kafka-go/protocol/initproducerid"
)

// initProducerID is the InitProducerId request without a transactional id. kafka-go's own type sends every such request
// to a transaction coordinator, which there is none without a transactional id; any broker answers this one. The response
// is kafka-go's.
type initProducerID struct {
	_ struct{} `kafka:"min=v2,max=v4,tag"` //nolint:unused // marks the flexible versions

	TransactionalID      string `kafka:"min=v0,max=v4,nullable"`
	TransactionTimeoutMs int32  `kafka:"min=v0,max=v4"`
	ProducerID           int64  `kafka:"min=v3,max=v4"`
	ProducerEpoch        int16  `kafka:"min=v3,max=v4"`
}

type initProducerIDResponse = initproducerid.Response

// initProducerOverride is not used by kafka-go for anything else.
const initProducerOverride protocol.OverrideTypeKey = 0x6273

func init() {
	protocol.RegisterOverride(&initProducerID{}, &initProducerIDResponse{}, initProducerOverride)
}

func (*initProducerID) ApiKey() protocol.ApiKey           { return protocol.InitProducerId }
func (*initProducerID) TypeKey() protocol.OverrideTypeKey { return initProducerOverride }
